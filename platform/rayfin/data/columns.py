"""Which columns of a row and which keys of a turn are used, refused, or reported as unused.

The tables here are the only place that says so. What they don't list is unused, and reported.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

COLUMNS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The columns that each format needs, in the order in which formats are tried on a row."""

OPTIONAL: dict[str, tuple[str, ...]] = {
    "preference": ("prompt",),
    "messages": ("system",),
    "conversations": ("system",),
    "instruction": ("input", "system", "history"),
    "prompt_completion": ("system", "history"),
    "text": (),
}
"""The columns that each format uses where a row has them."""

OTHER_NAMES: dict[str, dict[str, str]] = {
    "messages": {"system_prompt": "system"},
    "conversations": {"system_prompt": "system"},
    "instruction": {"response": "output", "context": "input", "system_prompt": "system"},
    "prompt_completion": {
        "question": "prompt",
        "query": "prompt",
        "answer": "completion",
        "response": "completion",
        "system_prompt": "system",
    },
}
"""For each format, other names of columns; one counts only where its column has no value."""

TURN_KEYS = (("role", "content"), ("from", "value"))
"""The pairs of keys that hold a turn's speaker and its text."""

LEARN_KEYS = ("weight", "train", "loss", "loss_weight")
"""The keys of a turn whose value 0 (or false) excludes the turn from the loss."""

SPEAKERS = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
TOOL_SPEAKERS = (
    *("tool", "tools", "tool_call", "tool_calls", "tool_response", "tool_result", "observation"),
    *("function", "function_call", "function-call", "function_response", "ipython"),
)

_TOOLS = "tool calls can't be trained on yet"
_MEDIA = "images, sound and video can't be trained on yet"
_REASONING = "reasoning beside an answer can't be trained on yet; put it into the content"
_WEIGHTS = "weights of whole samples can't be trained with yet"
_LABELS = (
    "which answers are good, or which class a text is of, can't be trained on yet; take the bad "
    "answers out"
)
_PAIRS = "rows of this format can't be preference pairs"
_TEMPLATE = "options of the chat template can't be given by the data yet"
_PARTIAL = "only whole turns can be left out of the learning (weight: 0)"
_CHOICES = "is a part of the question that this format has no place for; put it into the question"


def _with_reason(reason: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


_MEDIA_NAMES = "image images video videos audio audios"
_UNSUPPORTED = {
    **_with_reason(_TOOLS, "tools functions tool_calls function_call"),
    **_with_reason(_MEDIA, _MEDIA_NAMES),
    **_with_reason(_LABELS, "label kto_tag"),
    **_with_reason(
        _PAIRS, "chosen rejected rejected_response rejected_messages rejected_completion"
    ),
    **_with_reason(_WEIGHTS, "weight sample_weight loss_weight"),
    **_with_reason(_TEMPLATE, "chat_template chat_template_kwargs"),
}
"""Why a row with one of these columns is refused: it would be learned as what it is not."""

_UNSUPPORTED_IN = {
    "messages": _with_reason("earlier turns belong into messages", "history"),
    "conversations": _with_reason("earlier turns belong into conversations", "history"),
    "instruction": {
        **_with_reason(_CHOICES, "choices options"),
        "context": "input has a value already; put the two together",
    },
    "prompt_completion": _with_reason(_CHOICES, "context choices options input"),
}
_UNSUPPORTED_TURN_KEYS = {
    **_with_reason(_TOOLS, "tool_calls function_call tool_call_id tool_responses"),
    **_with_reason(_MEDIA, _MEDIA_NAMES),
    **_with_reason(_REASONING, "reasoning_content reasoning thinking"),
    **_with_reason(_PARTIAL, "train_detail training_detail train_on_detail loss_mask"),
}

TURN_COLUMNS = frozenset(
    {"messages", "conversations", "prompt", "completion", "history"}
    | OTHER_NAMES["prompt_completion"].keys() - {"system_prompt"}
)
"""The columns that may hold a list of turns, whose keys have names like `messages.name`."""

USED = frozenset(
    {column for need in (*COLUMNS.values(), *OPTIONAL.values()) for column in need}
    | {name for names in OTHER_NAMES.values() for name in names}
)
"""All columns that some format uses."""

NAMED = frozenset(
    USED | _UNSUPPORTED.keys() | {name for names in _UNSUPPORTED_IN.values() for name in names}
)
"""All columns that these tables name; their values decide what becomes of a row."""

NEEDED = frozenset(
    {column for need in COLUMNS.values() for column in need}
    | OTHER_NAMES["prompt_completion"].keys() - {"system_prompt"}
)
"""All columns that some format needs."""

NOT_NEEDED = frozenset(("input", "context", "system", "system_prompt", "history"))
"""The columns that are used where a row has them, but that no format needs."""


_PLAIN = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)
_YAML_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")


class RowProblem(ValueError):
    """A row can't be used; the message follows `FILE:LINE: `."""


class UnsupportedContent(RowProblem):
    """A row of a known format holds something that can't be trained on."""


@dataclass
class RowReader:
    """Picks the columns and keys of one row that a format uses, and records the others."""

    ignore: frozenset[str] = frozenset()
    """The columns, and keys of turns, that are ignored."""
    unused: set[str] = field(default_factory=set)
    """The names that the row has and that are not used."""
    unsupported: dict[str, str] = field(default_factory=dict)
    """The names whose content can't be trained on, with the reasons."""
    other_names: dict[str, str] = field(default_factory=dict)
    """The columns that have another name in this row, with that name."""

    def name_in_row(self, column: str) -> str:
        """Return the name that a column has in this row, for messages."""
        return self.other_names.get(column, column)

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
        needed = COLUMNS[shape]
        known = {*needed, *OPTIONAL[shape]}
        found = {}
        for name, value in row.items():
            blank = is_missing(value) if name in needed else is_blank(value, text=name not in known)
            if not blank and name not in self.ignore:
                found[name] = value
        for other, name in OTHER_NAMES.get(shape, {}).items():
            if other in found and is_blank(found.get(name)):
                found[name] = found.pop(other)
                self.other_names[name] = other
            elif other in found and found[name] == found[other]:
                del found[other]
        if missing := [name for name in needed if name not in found]:
            have = ", ".join(str(name) for name in list(row)[:8]) or "no column"
            raise RowProblem(
                f"{' and '.join(missing)} missing: format {shape} needs {_all_names(shape)}; "
                f"found {have}"
            )
        for name in [name for name in found if name not in known]:
            if (
                why := _UNSUPPORTED_IN.get(shape, {}).get(name) or _UNSUPPORTED.get(name)
            ) is not None:
                self.unsupported[name] = why
            self.unused.add(name)
            del found[name]
        return found

    def keys(self, turn: Mapping[str, Any], where: str, used: Container[str]) -> dict[str, Any]:
        """Return the used keys of a turn, or of a part of its content, and record the others.

        `where` is the name of the column, so that keys have the same names in all rows.
        """
        found = {}
        for key, value in turn.items():
            if key in used and not self.ignore:
                found[key] = value
                continue
            name = f"{where}.{key}"
            if name in self.ignore:
                continue
            if key in used:
                found[key] = value
            elif not is_blank(value, text=True):
                if key in _UNSUPPORTED_TURN_KEYS:
                    self.unsupported[name] = _UNSUPPORTED_TURN_KEYS[key]
                self.unused.add(name)
        return found


def ignore_setting(names: Iterable[str]) -> str:
    """Return the setting that ignores these columns and keys, quoted for a shell."""
    listed = sorted(names)
    if all(_PLAIN.fullmatch(name) and name.lower() not in _YAML_WORDS for name in listed):
        return f"data.ignore_columns=[{','.join(listed)}]"
    # JSON's own escapes of what is beyond 16 bits are halves of characters, which YAML refuses.
    text = "".join(
        each if each.isprintable() else f"\\U{ord(each):08x}"
        for each in json.dumps(listed, ensure_ascii=False)
    )
    return shlex.quote(f"data.ignore_columns={text}")


def _all_names(shape: str) -> str:
    """Return the columns that a format needs: `prompt (or question, query), completion`."""
    named = []
    for name in COLUMNS[shape]:
        others = [other for other, of in OTHER_NAMES.get(shape, {}).items() if of == name]
        named.append(f"{name} (or {', '.join(others)})" if others else name)
    return ", ".join(named)


def is_missing(value: object) -> bool:
    """Whether a value is missing: null, or the NaN that pandas writes in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_blank(value: object, *, text: bool = False) -> bool:
    """Whether a value is missing, white space, or a container of such values only.

    With `text`, a string that spells such a value counts too, as in a cell of a CSV.
    """
    if isinstance(value, str):
        return not value.strip() or (text and value.strip() in ("[]", "{}", "null", "NaN"))
    if isinstance(value, Mapping):
        return all(is_blank(each) for each in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_blank(each) for each in value)
    return is_missing(value)


def names_in(row: object) -> Iterator[str]:
    """Yield every name in this row that data.ignore_columns could list."""
    if not isinstance(row, Mapping):
        return
    for column, value in row.items():
        yield str(column)
        if column in TURN_COLUMNS:
            for turn in parsed_list(value):
                if isinstance(turn, Mapping):
                    yield from (f"{column}.{key}" for key in turn)
                    for part in parsed_list(turn.get("content")):
                        if isinstance(part, Mapping):
                            yield from (f"{column}.content.{key}" for key in part)


def parsed_list(value: object) -> list[Any]:
    """Return a list as it is, or from its JSON text, and an empty list for anything else."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return value if isinstance(value, list) else []
