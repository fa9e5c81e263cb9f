"""The shapes that rows come in, and how each becomes an `Example`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rayfin.data.columns import (
    COLUMNS,
    OTHER_NAMES,
    TURN_KEYS,
    Reading,
    Refused,
    RowProblem,
    parsed_list,
)
from rayfin.data.examples import Example
from rayfin.data.turns import Turn, as_list, conversation, kind, string, turns


def fitting_shape(row: object, ignore: frozenset[str] = frozenset()) -> str | None:
    """The first shape that the row has, or None; a row that is refused has one, too."""
    for shape in COLUMNS:
        try:
            to_example(row, shape, Reading(ignore))
        except Refused:
            return shape
        except RowProblem:
            continue
        return shape
    return None


def nearest_shape(row: object, ignore: frozenset[str] = frozenset()) -> str | None:
    """The shape whose columns the row has most of, or None where it has not one of them."""
    if not isinstance(row, Mapping):
        return None
    has = {name for name, value in row.items() if name not in ignore and value is not None}

    def share(shape: str) -> float:
        named = has | {name for other, name in OTHER_NAMES.get(shape, {}).items() if other in has}
        return len(named & set(COLUMNS[shape])) / len(COLUMNS[shape])

    best = max(COLUMNS, key=share)
    return best if share(best) > 0 else None


def to_example(row: object, shape: str, reading: Reading | None = None) -> Example:
    """The row in normal form; raises RowProblem where it does not satisfy `shape`.

    `reading` says what of the row to ignore, and is told what was not used.
    """
    if not isinstance(row, Mapping):
        raise RowProblem(f"a row must be an object, not {kind(row)}")
    reading = reading or Reading()
    columns = reading.columns(row, shape)
    try:
        example = _READERS[shape](columns, reading)
    except RowProblem as problem:
        if reading.refused:
            raise reading.refusal(problem) from None
        raise
    if reading.refused:
        raise reading.refusal()
    return example


def _from_messages(row: Mapping[str, Any], reading: Reading) -> Example:
    return _with_system(row, turns(row["messages"], "messages", reading), "messages", reading)


def _from_conversations(row: Mapping[str, Any], reading: Reading) -> Example:
    said = turns(row["conversations"], "conversations", reading)
    return _with_system(row, said, "conversations", reading)


def _from_instruction(row: Mapping[str, Any], reading: Reading) -> Example:
    question = string(row["instruction"], "instruction")
    if "input" in row:
        question = f"{question}\n\n{string(row['input'], reading.written('input'))}"
    answer = Turn("assistant", string(row["output"], reading.written("output")))
    said = [*_history(row, reading), Turn("user", question), answer]
    return _with_system(row, said, "output", reading)


def _from_prompt_completion(row: Mapping[str, Any], reading: Reading) -> Example:
    asked = _said(row["prompt"], "prompt", "user", reading)
    answer = _said(row["completion"], "completion", "assistant", reading)
    return _with_system(row, [*_history(row, reading), *asked, *answer], "completion", reading)


def _from_text(row: Mapping[str, Any], reading: Reading) -> Example:
    return Example(text=string(row["text"], "text"))


def _from_preference(row: Mapping[str, Any], reading: Reading) -> Example:
    """The prompt with the chosen answer; recognises the shape, nothing trains on it yet."""
    prompt = _said(row["prompt"], "prompt", "user", reading) if "prompt" in row else []
    _said(row["rejected"], "rejected", "assistant", reading)
    chosen = _said(row["chosen"], "chosen", "assistant", reading)
    return Example(messages=tuple(turn.message() for turn in [*prompt, *chosen]))


_READERS: dict[str, Callable[[Mapping[str, Any], Reading], Example]] = {
    "messages": _from_messages,
    "conversations": _from_conversations,
    "instruction": _from_instruction,
    "prompt_completion": _from_prompt_completion,
    "text": _from_text,
    "preference": _from_preference,
}


def _with_system(
    row: Mapping[str, Any], said: list[Turn], column: str, reading: Reading
) -> Example:
    """The conversation, with the column `system` as its first turn."""
    column = reading.written(column)
    if "system" in row:
        name = reading.written("system")
        system = string(row["system"], name)
        if not said or said[0].role != "system":
            said = [Turn("system", system), *said]
        elif said[0].content != system:
            raise RowProblem(
                f"{name} and the system turn of {column} differ; give one of them, or leave the "
                f"column out with data.ignore_columns=[{name}]"
            )
    return conversation(said, column)


def _history(row: Mapping[str, Any], reading: Reading) -> list[Turn]:
    """Earlier turns: pairs of a question and its answer, or a list of turns."""
    earlier: list[Turn] = []
    for number, each in enumerate(as_list(row.get("history", []), "history")):
        if isinstance(each, Mapping):
            return turns(row["history"], "history", reading)
        where = f"history[{number}]"
        if not isinstance(each, (list, tuple)) or len(each) != 2:
            raise RowProblem(f"{where} must be a pair [question, answer], not {kind(each)}")
        earlier += [Turn("user", string(each[0], where)), Turn("assistant", string(each[1], where))]
    return earlier


def _said(value: object, column: str, role: str, reading: Reading) -> list[Turn]:
    """A column that is either one turn's text or a list of messages, also as its JSON text."""
    column = reading.written(column)
    if isinstance(value, str) and not _is_turns(parsed_list(value)):
        return [Turn(role, string(value, column))]
    return turns(value, column, reading)


def _is_turns(value: list[Any]) -> bool:
    """Whether each of a list says who speaks; another list may well be a question's text."""
    speakers = {pair[0] for pair in TURN_KEYS}
    return bool(value) and all(
        isinstance(each, Mapping) and speakers & each.keys() for each in value
    )
