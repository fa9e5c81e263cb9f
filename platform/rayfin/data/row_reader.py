"""Pick the columns of a row that a format uses, by the user's settings, and record the others."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rayfin.data.columns import (
    COLUMNS,
    OPTIONAL,
    OTHER_NAMES,
    PARTS,
    UNSUPPORTED,
    UNSUPPORTED_IN,
    UNSUPPORTED_TURN_KEYS,
    is_blank,
    is_missing,
    parsed_list,
)
from rayfin.data.row_settings import RowSettings
from rayfin.data.rows import TableRow

_PLAIN = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)
_YAML_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
_MOST_NAMES = 2
_MOST_PLANS = 1000
_INSTRUCTIONS = ("instruction", "指令")


class RowProblem(ValueError):
    """A row can't be used; the message follows `FILE:LINE: `."""


class UnsupportedContent(RowProblem):
    """A row of a known format holds something that can't be trained on."""


class _Plan(NamedTuple):
    """What a format makes of the columns of a row with certain names."""

    used: tuple[tuple[str, str, bool], ...]
    """(the row's name, the format's column, whether it is needed)."""
    others: tuple[tuple[str, str], ...]
    """(the row's name, the column that it is another name of), the preferred ones first."""
    unused: tuple[tuple[str, str | None], ...]
    """(the row's name, why a row that has a value there is refused)."""
    needed: tuple[str, ...]
    """The columns that the format needs."""
    has_instruction: bool
    """Whether one of the names is that of an instruction."""


@dataclass
class RowReader:
    """Picks the columns and keys of one row that a format uses, and records the others."""

    settings: RowSettings = field(default_factory=RowSettings)
    unused: set[str] = field(default_factory=set)
    """The names that the row has and that are not used."""
    unsupported: dict[str, str] = field(default_factory=dict)
    """The names whose content can't be trained on, with the reasons."""
    other_names: dict[str, str] = field(default_factory=dict)
    """The columns that have another name in this row, with that name."""
    spelled_turns: dict[str, bool] = field(default_factory=dict)
    """The columns with the JSON text of a list of turns, with whether turns are made of it."""
    of_table: bool = False
    """Whether the row is of a table whose cells are all texts."""
    _plans: dict[tuple[str, ...], _Plan] = field(default_factory=dict)

    def begin_row(self) -> None:
        """Forget what the last row had."""
        if self.unused:
            self.unused.clear()
            self.unsupported.clear()
        if self.other_names:
            self.other_names.clear()
        if self.spelled_turns:
            self.spelled_turns.clear()

    def name_in_row(self, column: str) -> str:
        """Return the name that a column has in this row, for messages."""
        return self.other_names.get(column) or self.settings.name_of(column)

    def unsupported_error(self, otherwise: RowProblem | None = None) -> UnsupportedContent:
        """Return the error that lists all unsupported names of the row, with the remedy.

        `otherwise` is what is wrong with the rest of the row.
        """
        names, reasons = (
            " and ".join(self.unsupported),
            "; ".join(dict.fromkeys(self.unsupported.values())),
        )
        if otherwise is None:
            return UnsupportedContent(
                f"{names}: {reasons}; {ignore_setting(self.unsupported)} trains on the rest of the "
                "row"
            )
        return UnsupportedContent(
            f"{names}: {reasons}; nor can what remains be learned: {otherwise}"
        )

    def columns(self, row: Mapping[str, Any], shape: str) -> dict[str, Any]:
        """Return the row's values for the columns that `shape` uses, without blank ones.

        Records what is unused or unsupported. Raises RowProblem for a missing column.
        """
        self.of_table = isinstance(row, TableRow)
        plan = self._plan(row, shape)
        found = {}
        for name, column, needed in plan.used:
            value = row[name]
            if not (is_missing(value) if needed else is_blank(value, text=column == "tools")):
                found[column] = value
        for name, column in plan.others:
            value = row[name]
            if is_blank(value, text=True):
                continue
            if is_blank(found.get(column)):
                found[column] = value
                self.other_names[column] = name
            elif found[column] != value:
                self._record(name, _why_unsupported(shape, name))
        if shape == "instruction":
            self._fill_instruction(found, plan)
        for name, why in plan.unused:
            if not is_blank(row[name], text=True):
                self._record(name, why)
        if shape in ("prompt_completion", "instruction") and self.unsupported:
            self._suggest_input(found, shape)
        if shape == "text" and isinstance(row.get("label"), str) and "label" in self.unsupported:
            names = {"prompt": self.name_in_row("text"), "completion": "label"}
            self.unsupported["label"] += f", or set {columns_setting(names)}"
        for column in plan.needed:
            if column not in found:
                raise self._missing(row, shape, found)
        return found

    def used_names(self, row: Mapping[str, Any], shape: str) -> list[tuple[str, str]]:
        """Return (the row's name, the format's column) of each column that `shape` may use."""
        plan = self._plan(row, shape)
        return [*((name, column) for name, column, _ in plan.used), *plan.others]

    def _plan(self, row: Mapping[str, Any], shape: str) -> _Plan:
        names = (shape, *row)
        plan = self._plans.get(names)
        if plan is None:
            if len(self._plans) > _MOST_PLANS:  # rows of names of their own
                self._plans.clear()
            plan = self._plans[names] = _plan(shape, names[1:], self.settings)
        return plan

    def keys(self, turn: Mapping[str, Any], where: str, used: Container[str]) -> dict[str, Any]:
        """Return the used keys of a turn, or of a part of its content, and record the others.

        `where` is the name of the column, so that keys have the same names in all rows.
        """
        found = {}
        ignore = self.settings.ignore
        for key, value in turn.items():
            if key in used and not ignore:
                found[key] = value
                continue
            name = f"{where}.{key}"
            if name in ignore:
                continue
            if key in used:
                found[key] = value
            elif not is_blank(value, text=True):
                self._record(name, UNSUPPORTED_TURN_KEYS.get(key))
        return found

    def _fill_instruction(self, found: dict[str, Any], plan: _Plan) -> None:
        """Make the input the instruction of a row that has the column, but nothing in it."""
        if not plan.has_instruction or "input" not in found:
            return
        if is_blank(found.get("instruction")):
            found["instruction"] = found.pop("input")
            self.other_names.pop("input", None)

    def _suggest_input(self, found: Mapping[str, Any], shape: str) -> None:
        """Add the setting that makes an input of what stands beside a question in the row."""
        beside = [each for each in self.unsupported if _why_unsupported(shape, each) in PARTS]
        texts = [isinstance(found.get(column), str) for column in COLUMNS[shape]]
        if len(beside) != 1 or not all(texts) or "input" in found:
            return
        asked, answer = map(self.name_in_row, COLUMNS[shape])
        names = {"instruction": asked, "input": beside[0], "output": answer}
        if beside[0].strip().casefold() in _INSTRUCTIONS:
            names |= {"instruction": beside[0], "input": asked}
        self.unsupported[beside[0]] += f", or set {columns_setting(names)}"

    def _record(self, name: str, why: str | None) -> None:
        if why is not None:
            self.unsupported[name] = why
        self.unused.add(name)

    def _missing(self, row: Mapping[str, Any], shape: str, found: Container[str]) -> RowProblem:
        """Return the error for a row without a column that its format needs."""
        missing = [name for name in COLUMNS[shape] if name not in found]
        have = ", ".join(str(name) for name in list(row)[:8]) or "no column"
        lacking = " and ".join(map(self.settings.name_of, missing))
        return RowProblem(
            f"{lacking} missing: format {shape} needs {self._needed(shape)}; found {have}"
        )

    def _needed(self, shape: str) -> str:
        """Return the columns that a format needs: `prompt (or question, query), completion`."""
        named = []
        for column in COLUMNS[shape]:
            name = self.settings.name_of(column)
            others = [o for o, of in OTHER_NAMES[shape].items() if of == column and o.isascii()]
            shown = others[:_MOST_NAMES] if name == column else []
            named.append(f"{name} (or {', '.join(shown)})" if shown else name)
        return ", ".join(named)


def _plan(shape: str, names: tuple[str, ...], settings: RowSettings) -> _Plan:
    needed, known = COLUMNS[shape], {*COLUMNS[shape], *OPTIONAL[shape]}
    aliases = OTHER_NAMES[shape]
    used, unused = [], []
    others: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        if name in settings.ignore:
            continue
        column = settings.column_of(name)
        plain = name.strip().casefold()
        if column in known:
            used.append((name, column, column in needed))
        elif (other := plain if plain in known else aliases.get(plain)) and (
            other not in settings.named
        ):
            others.setdefault(plain, []).append((name, other))
        else:
            unused.append((name, _why_unsupported(shape, name)))
    # A format's own name in capital letters is preferred to its other names.
    ordered = [pair for plain in (*known, *aliases) for pair in others.get(plain, ())]
    columns = [column for _, column, *_ in (*used, *ordered)]
    return _Plan(tuple(used), tuple(ordered), tuple(unused), needed, "instruction" in columns)


def _why_unsupported(shape: str, name: str) -> str | None:
    plain = name.strip().casefold()
    return UNSUPPORTED_IN.get(shape, {}).get(plain) or UNSUPPORTED.get(plain)


def names_in(row: object) -> Iterator[str]:
    """Yield every name in this row that data.ignore_columns could list."""
    if isinstance(row, Mapping):
        for column, value in row.items():
            yield str(column)
            yield from _names_below(str(column), value, 3)


def _names_below(name: str, value: object, depth: int) -> Iterator[str]:
    below = [value] if depth < 3 and isinstance(value, Mapping) else parsed_list(value)
    for each in below if depth else ():
        if isinstance(each, Mapping):
            for key, inner in each.items():
                yield f"{name}.{key}"
                yield from _names_below(f"{name}.{key}", inner, depth - 1)


def ignore_setting(names: Iterable[str]) -> str:
    """Return the setting that ignores these columns and keys, quoted for a shell."""
    listed = sorted(names)
    if all(map(_is_plain, listed)):
        return f"data.ignore_columns=[{','.join(listed)}]"
    return shlex.quote(f"data.ignore_columns={_as_yaml(listed)}")


def columns_setting(names: Mapping[str, str]) -> str:
    """Return the setting that says which of a table's columns are a format's, for a shell."""
    if all(map(_is_plain, names.values())):
        listed = ", ".join(f"{column}: {name}" for column, name in names.items())
        return f"'data.columns={{{listed}}}'"
    return shlex.quote(f"data.columns={_as_yaml(dict(names))}")


def _is_plain(name: str) -> bool:
    return bool(_PLAIN.fullmatch(name)) and name.lower() not in _YAML_WORDS


def _as_yaml(value: object) -> str:
    # JSON's own escapes of what is beyond 16 bits are halves of characters, which YAML refuses.
    return "".join(
        each if each.isprintable() else f"\\U{ord(each):08x}"
        for each in json.dumps(value, ensure_ascii=False)
    )
