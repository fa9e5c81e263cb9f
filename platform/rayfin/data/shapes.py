"""The shapes that rows come in, and how each becomes an `Example`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from rayfin.data.examples import Example, Message

COLUMNS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Shape -> the columns it needs, in the order in which a row is tried against them."""

USED_COLUMNS = frozenset({"input", *(column for need in COLUMNS.values() for column in need)})
"""Every column that some shape reads; all others are ignored."""

ROLES = ("system", "user", "assistant")
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_KINDS = {str: "a string", bool: "a boolean", list: "a list", dict: "an object", type(None): "null"}


class RowProblem(ValueError):
    """Why a row can't be used, in words that follow `FILE:LINE: `."""


def fitting_shape(row: object) -> str | None:
    """The first shape that the row satisfies entirely, or None."""
    for shape in COLUMNS:
        try:
            to_example(row, shape)
        except RowProblem:
            continue
        return shape
    return None


def nearest_shape(row: object) -> str | None:
    """The shape whose columns the row has most of, or None where it has not one of them."""
    if not isinstance(row, Mapping):
        return None

    def share(shape: str) -> float:
        need = COLUMNS[shape]
        return sum(row.get(column) is not None for column in need) / len(need)

    best = max(COLUMNS, key=share)
    return best if share(best) > 0 else None


def to_example(row: object, shape: str) -> Example:
    """The row in normal form; raises RowProblem where it does not satisfy `shape`."""
    if not isinstance(row, Mapping):
        raise RowProblem(f"a row must be an object, not {_kind(row)}")
    missing = [column for column in COLUMNS[shape] if row.get(column) is None]
    if missing:
        have = ", ".join(str(column) for column in list(row)[:8]) or "no column"
        need = ", ".join(COLUMNS[shape])
        raise RowProblem(
            f"{' and '.join(missing)} missing: format {shape} needs {need}; found {have}"
        )
    return _READERS[shape](row)


def _from_messages(row: Mapping[str, Any]) -> Example:
    return _conversation(_turns(row["messages"], "messages", "role", "content"), "messages")


def _from_conversations(row: Mapping[str, Any]) -> Example:
    turns = _turns(row["conversations"], "conversations", "from", "value")
    return _conversation(turns, "conversations")


def _from_instruction(row: Mapping[str, Any]) -> Example:
    question = _string(row["instruction"], "instruction")
    extra = row.get("input")
    if extra is not None and _string(extra, "input", may_be_empty=True).strip():
        question = f"{question}\n\n{extra}"
    return _answered(question, _string(row["output"], "output"))


def _from_prompt_completion(row: Mapping[str, Any]) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _answered(_string(prompt, "prompt"), _string(completion, "completion"))
    return _conversation(
        _said(prompt, "prompt", "user") + _said(completion, "completion", "assistant"),
        "completion",
    )


def _from_text(row: Mapping[str, Any]) -> Example:
    return Example(text=_string(row["text"], "text"))


def _from_preference(row: Mapping[str, Any]) -> Example:
    """The prompt with the chosen answer; recognises the shape, nothing trains on it yet."""
    prompt = _said(row["prompt"], "prompt", "user") if row.get("prompt") is not None else []
    _said(row["rejected"], "rejected", "assistant")
    return Example(messages=tuple(prompt + _said(row["chosen"], "chosen", "assistant")))


_READERS: dict[str, Callable[[Mapping[str, Any]], Example]] = {
    "messages": _from_messages,
    "conversations": _from_conversations,
    "instruction": _from_instruction,
    "prompt_completion": _from_prompt_completion,
    "text": _from_text,
    "preference": _from_preference,
}


def _answered(question: str, answer: str) -> Example:
    return Example(
        messages=(
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        )
    )


def _said(value: object, column: str, role: str) -> list[Message]:
    """A column that is either one turn's text or a list of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": _string(value, column)}]
    return _turns(value, column, "role", "content")


def _turns(value: object, column: str, role_key: str, content_key: str) -> list[Message]:
    if isinstance(value, str):  # CSV can hold a list only as JSON
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowProblem(f"{column} must be a list of turns, not a string") from None
    if not isinstance(value, list):
        raise RowProblem(f"{column} must be a list of turns, not {_kind(value)}")
    roles = _SPEAKERS if role_key == "from" else {role: role for role in ROLES}
    turns: list[Message] = []
    for number, turn in enumerate(value):
        where = f"{column}[{number}]"
        if not isinstance(turn, Mapping):
            raise RowProblem(f"{where} must be an object, not {_kind(turn)}")
        for key in (role_key, content_key):
            if turn.get(key) is None:
                raise RowProblem(f"{where}.{key} is missing")
        role = turn[role_key]
        if not isinstance(role, str) or role not in roles:
            raise RowProblem(f"{where}.{role_key} is {role!r:.40}; allowed are {', '.join(roles)}")
        content = _string(
            turn[content_key], f"{where}.{content_key}", may_be_empty=roles[role] == "system"
        )
        if content.strip():  # exports often hold an empty system turn: it says nothing
            turns.append({"role": roles[role], "content": content})
    return turns


def _conversation(turns: list[Message], column: str) -> Example:
    if not turns:
        raise RowProblem(f"{column} is empty")
    if any(turn["role"] == "system" for turn in turns[1:]):
        raise RowProblem(f"{column} has a system turn that is not the first")
    if turns[-1]["role"] != "assistant":
        raise RowProblem(f"{column} ends with a {turns[-1]['role']} turn, not an assistant turn")
    if not any(turn["role"] == "user" for turn in turns):
        raise RowProblem(f"{column} has no user turn before the answer")
    return Example(messages=tuple(turns))


def _string(value: object, where: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise RowProblem(f"{where} must be a string, not {_kind(value)}")
    if not may_be_empty and not value.strip():
        raise RowProblem(f"{where} is empty")
    try:
        # JSON can spell half of a surrogate pair, which no tokenizer takes; undecodable bytes
        # of a CSV arrive the same way.
        value.encode()
    except UnicodeEncodeError:
        raise RowProblem(f"{where} is not valid UTF-8 text") from None
    return value


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "a number" if isinstance(value, (int, float)) else "an object")
