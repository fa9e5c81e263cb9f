"""Which columns of a row, and which keys of a turn, are used, refused, or named as not used.

This is the one place that says so. What is not in these tables is not used, and reported by name.
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
"""Shape -> the columns it needs, in the order in which a row is tried against them."""

OPTIONAL: dict[str, tuple[str, ...]] = {
    "preference": ("prompt",),
    "messages": ("system",),
    "conversations": ("system",),
    "instruction": ("input", "system", "history"),
    "prompt_completion": ("system", "history"),
    "text": (),
}
"""Shape -> the columns it uses where a row has them."""

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
"""Shape -> another name of a column -> the column. It counts only where the column has no value."""

TURN_KEYS = (("role", "content"), ("from", "value"))
"""What tells who speaks in a turn, and what tells the words."""

LEARN_KEYS = ("weight", "train", "loss", "loss_weight")
"""Keys of a turn whose 0 (or false) says that it is not to be learned."""

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
_PAIRS = "preference pairs can't be trained on yet"
_TEMPLATE = "options of the chat template can't be given by the data yet"
_PARTIAL = "only whole turns can be left out of the learning (weight: 0)"
_CHOICES = "is a part of the question that this format has no place for; put it into the question"


def _each(reason: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


_MEDIA_NAMES = "image images video videos audio audios"
_REFUSED = {
    **_each(_TOOLS, "tools functions tool_calls function_call"),
    **_each(_MEDIA, _MEDIA_NAMES),
    **_each(_LABELS, "label kto_tag"),
    **_each(_PAIRS, "chosen rejected rejected_response rejected_messages rejected_completion"),
    **_each(_WEIGHTS, "weight sample_weight loss_weight"),
    **_each(_TEMPLATE, "chat_template chat_template_kwargs"),
}
"""Column -> why a row that has it is refused: it would be learned as something else than it is."""

_REFUSED_IN = {
    "messages": _each("earlier turns belong into messages", "history"),
    "conversations": _each("earlier turns belong into conversations", "history"),
    "instruction": {
        **_each(_CHOICES, "choices options"),
        "context": "input has a value already; put the two together",
    },
    "prompt_completion": _each(_CHOICES, "context choices options input"),
}
_REFUSED_TURN_KEYS = {
    **_each(_TOOLS, "tool_calls function_call tool_call_id tool_responses"),
    **_each(_MEDIA, _MEDIA_NAMES),
    **_each(_REASONING, "reasoning_content reasoning thinking"),
    **_each(_PARTIAL, "train_detail training_detail train_on_detail loss_mask"),
}

TURN_COLUMNS = frozenset(
    {"messages", "conversations", "prompt", "completion", "history"}
    | OTHER_NAMES["prompt_completion"].keys() - {"system_prompt"}
)
"""Columns that may hold a list of turns, whose keys have names like `messages.name`."""

USED = frozenset(
    {column for need in (*COLUMNS.values(), *OPTIONAL.values()) for column in need}
    | {name for names in OTHER_NAMES.values() for name in names}
)
"""Every column that some shape uses."""

NAMED = frozenset(
    USED | _REFUSED.keys() | {name for names in _REFUSED_IN.values() for name in names}
)
"""Every column that these tables name: its values decide what becomes of a row."""

NEEDED = frozenset(
    {column for need in COLUMNS.values() for column in need}
    | OTHER_NAMES["prompt_completion"].keys() - {"system_prompt"}
)
"""Columns without which a row has no shape."""

NOT_NEEDED = frozenset(("input", "context", "system", "system_prompt", "history"))
"""Columns that are used where a row has them, and that no shape needs."""


_PLAIN = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)
_YAML_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")


class RowProblem(ValueError):
    """Why a row can't be used, in words that follow `FILE:LINE: `."""


class Refused(RowProblem):
    """Why a row of a known shape is not learned: it holds what can't be trained on."""


@dataclass
class Reading:
    """What reading a row is to ignore, and what of the row it did not use."""

    ignore: frozenset[str] = frozenset()
    unused: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    """What of it can't be trained on, by name, and why."""
    other_names: dict[str, str] = field(default_factory=dict)
    """Column -> the other name that it has in this row."""

    def written(self, column: str) -> str:
        """The name that a column has in this row, for what is told of it."""
        return self.other_names.get(column, column)

    def refusal(self, otherwise: RowProblem | None = None) -> Refused:
        """All that is refused of the row, and what is left to do.

        `otherwise`: what is wrong with the rest.
        """
        names, reasons = " and ".join(self.refused), "; ".join(dict.fromkeys(self.refused.values()))
        if otherwise is None:
            return Refused(
                f"{names}: {reasons}; {ignoring(self.refused)} trains on the rest of the row"
            )
        return Refused(f"{names}: {reasons}; nor can what remains be learned: {otherwise}")

    def columns(self, row: Mapping[str, Any], shape: str) -> dict[str, Any]:
        """The columns that `shape` uses and that hold something, by their proper names.

        Notes what is not used, and what is refused. Raises RowProblem for a column that is missing.
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
            if (why := _REFUSED_IN.get(shape, {}).get(name) or _REFUSED.get(name)) is not None:
                self.refused[name] = why
            self.unused.add(name)
            del found[name]
        return found

    def keys(self, turn: Mapping[str, Any], where: str, used: Container[str]) -> dict[str, Any]:
        """The keys of a turn, or of a part of its content, that are used; as `columns` does it.

        `where` is the column, so that keys are named alike in all rows.
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
                if key in _REFUSED_TURN_KEYS:
                    self.refused[name] = _REFUSED_TURN_KEYS[key]
                self.unused.add(name)
        return found


def ignoring(names: Iterable[str]) -> str:
    """The setting that ignores these columns and keys, as a shell takes it."""
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
    """`prompt (or question, query), completion`: the columns that a shape needs."""
    named = []
    for name in COLUMNS[shape]:
        others = [other for other, of in OTHER_NAMES.get(shape, {}).items() if of == name]
        named.append(f"{name} (or {', '.join(others)})" if others else name)
    return ", ".join(named)


def is_missing(value: object) -> bool:
    """Whether there is no value: null, or the NaN that pandas writes in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_blank(value: object, *, text: bool = False) -> bool:
    """Whether a value says nothing: a missing one, white space, or a container of only such.

    `text`: also where it is text that stands for one of them, as cells of a CSV do.
    """
    if isinstance(value, str):
        return not value.strip() or (text and value.strip() in ("[]", "{}", "null", "NaN"))
    if isinstance(value, Mapping):
        return all(is_blank(each) for each in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_blank(each) for each in value)
    return is_missing(value)


def names_in(row: object) -> Iterator[str]:
    """All names that data.ignore_columns could have for something in this row."""
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
    """A list as it is, or from its JSON text; anything else is empty."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return value if isinstance(value, list) else []
