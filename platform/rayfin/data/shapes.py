"""Recognise the format of a row, and convert it to an `Example`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rayfin.data.columns import COLUMNS, OTHER_NAMES, SPEAKER_KEYS, parsed_list
from rayfin.data.row_reader import RowProblem, RowReader, UnsupportedContent, ignore_setting
from rayfin.data.row_settings import RowSettings
from rayfin.data.tool_calls import tools_of
from rayfin.data.turns import (
    Turn,
    as_list,
    as_text,
    conversation,
    is_conversation,
    is_pair,
    is_text,
    kind,
    question_and_answer,
    string,
    turns,
    usual_conversation,
)
from rayfin.samples import Example, Tool


def fitting_shape(row: object, settings: RowSettings) -> str | None:
    """Return the first format that fits the row, or None.

    A row with unsupported content has a format, too.
    """
    for shape in settings.shapes():
        try:
            to_example(row, shape, RowReader(settings))
        except UnsupportedContent:
            # A row with an instruction that can't be read is no question for want of a better fit.
            if shape == "prompt_completion" and nearest_shape(row, settings) == "instruction":
                continue
            return shape
        except RowProblem:
            continue
        return shape
    return None


def nearest_shape(row: object, settings: RowSettings) -> str | None:
    """Return the format whose columns the row has the largest share of, or None if it has none."""
    if not isinstance(row, Mapping):
        return None
    has = {
        settings.column_of(name) or name
        for name, value in row.items()
        if name not in settings.ignore and value is not None
    }
    plain = {name.strip().casefold() for name in has}

    def share(shape: str) -> float:
        named = has | plain | {of for other, of in OTHER_NAMES[shape].items() if other in plain}
        return len(named & set(COLUMNS[shape])) / len(COLUMNS[shape])

    best = max(settings.shapes(), key=share)
    return best if share(best) > 0 else None


def to_example(row: object, shape: str, reader: RowReader | None = None) -> Example:
    """Convert a row to an example; raises RowProblem where it does not satisfy `shape`.

    `reader` knows what of the row to ignore, and records what is not used.
    """
    if isinstance(row, list) and shape == "messages" and is_turns(row):
        row = {"messages": row}
    if type(row) is not dict and not isinstance(row, Mapping):
        raise RowProblem(no_object(row))
    reader = reader or RowReader()
    columns = reader.columns(row, shape)
    try:
        example = _READERS[shape](columns, reader)
        if "tools" in columns:
            example = replace(example, tools=_tools(columns["tools"], reader))
    except RowProblem as problem:
        if reader.unsupported:
            raise reader.unsupported_error(problem) from None
        raise
    if reader.unsupported:
        raise reader.unsupported_error()
    return example


def no_object(row: object) -> str:
    """Return why what is neither an object nor a list of turns can't be a row."""
    rows = isinstance(row, list) and all(isinstance(each, Mapping) for each in row)
    remedy = "; jq -c '.[]' FILE writes the items of such lists as rows" * rows
    return f"a row must be an object with columns, not {kind(row)}{remedy}"


_PAIR = COLUMNS["prompt_completion"]


def _from_messages(row: Mapping[str, Any], reader: RowReader) -> Example:
    if len(row) == 1 and (usual := usual_conversation(row["messages"], reader)):
        return usual
    said = turns(row["messages"], reader.name_in_row("messages"), reader)
    return _with_system(row, said, "messages", reader)


def _from_conversations(row: Mapping[str, Any], reader: RowReader) -> Example:
    if len(row) == 1 and (usual := usual_conversation(row["conversations"], reader)):
        return usual
    said = turns(row["conversations"], reader.name_in_row("conversations"), reader)
    return _with_system(row, said, "conversations", reader)


def _from_instruction(row: Mapping[str, Any], reader: RowReader) -> Example:
    question = _text(row, "instruction", reader)
    if "input" in row:
        question = f"{question}\n\n{_text(row, 'input', reader)}"
    answer = _text(row, "output", reader)
    if "system" not in row and "history" not in row:
        return question_and_answer(question, answer)
    said = [*_history(row, reader), Turn("user", question), Turn("assistant", answer)]
    return _with_system(row, said, "output", reader)


def _from_prompt_completion(row: Mapping[str, Any], reader: RowReader) -> Example:
    if len(row) == 2 and all(type(text) is str and "[" not in text for text in row.values()):
        return question_and_answer(*(_text(row, column, reader) for column in _PAIR))
    asked = _said(row["prompt"], "prompt", "user", reader)
    said = _said(row["completion"], "completion", "assistant", reader)
    return _with_system(row, [*_history(row, reader), *asked, *said], "completion", reader)


def _from_text(row: Mapping[str, Any], reader: RowReader) -> Example:
    return Example(text=_text(row, "text", reader))


def _from_preference(row: Mapping[str, Any], reader: RowReader) -> Example:
    prompt = _said(row["prompt"], "prompt", "user", reader) if "prompt" in row else []
    rejected = [*prompt, *_said(row["rejected"], "rejected", "assistant", reader)]
    chosen = [*prompt, *_said(row["chosen"], "chosen", "assistant", reader)]
    return replace(
        conversation(chosen, reader.name_in_row("chosen")),
        rejected=conversation(rejected, reader.name_in_row("rejected")).messages,
    )


_READERS: dict[str, Callable[[Mapping[str, Any], RowReader], Example]] = {
    "messages": _from_messages,
    "conversations": _from_conversations,
    "instruction": _from_instruction,
    "prompt_completion": _from_prompt_completion,
    "text": _from_text,
    "preference": _from_preference,
}


def _tools(value: object, reader: RowReader) -> tuple[Tool, ...]:
    name = reader.name_in_row("tools")
    try:
        return tools_of(value, name)
    except RowProblem as problem:
        rest = f"{ignore_setting([name])} trains on the rest of the row"
        raise RowProblem(f"{problem}; {rest}") from None


def _with_system(
    row: Mapping[str, Any], said: list[Turn], column: str, reader: RowReader
) -> Example:
    """Return the conversation, with the column `system` as its first turn."""
    column = reader.name_in_row(column)
    if "system" in row:
        name, system = reader.name_in_row("system"), _text(row, "system", reader)
        if not said or said[0].role != "system":
            said = [Turn("system", system), *said]
        elif said[0].content != system:
            raise RowProblem(
                f"{name} and the system turn of {column} differ; give one of them, or leave the "
                f"column out with data.ignore_columns=[{name}]"
            )
    return conversation(said, column)


def _text(row: Mapping[str, Any], column: str, reader: RowReader) -> str:
    """Return the text of a column; raises RowProblem for what can't be learned."""
    value = row[column]
    return value if is_text(value) else string(value, reader.name_in_row(column))


def _history(row: Mapping[str, Any], reader: RowReader) -> list[Turn]:
    """Return the earlier turns, given as pairs of question and answer or as a list of turns."""
    earlier: list[Turn] = []
    name = reader.name_in_row("history")
    for number, each in enumerate(as_list(row.get("history", []), name)):
        if isinstance(each, Mapping):
            return turns(row["history"], name, reader)
        where = f"{name}[{number}]"
        if not isinstance(each, (list, tuple)) or len(each) != 2:
            raise RowProblem(f"{where} must be a pair [question, answer], not {kind(each)}")
        earlier += [Turn("user", string(each[0], where)), Turn("assistant", string(each[1], where))]
    return earlier


def _said(value: object, column: str, role: str, reader: RowReader) -> list[Turn]:
    """Return the turns of a column that holds one turn's text, or a list of turns.

    A list that is spelled as JSON is one in a table, whose cells hold nothing else, and a text in
    all other files, where an answer may be meant to be JSON.
    """
    column = reader.name_in_row(column)
    if isinstance(value, str):
        said = parsed_list(value)
        if is_conversation(said):
            reader.spelled_turns[column] = reader.of_table
            if reader.of_table:
                return turns(said, column, reader)
        return [Turn(role, string(value, column))]
    if not isinstance(value, (list, tuple)):
        remedy = as_text(value)
        raise RowProblem(f"{column} must be a text or a list of turns, not {kind(value)}{remedy}")
    return turns(value, column, reader)


def is_turns(value: list[Any]) -> bool:
    """Whether all items of a list name a speaker; another list may be the text of a question."""
    return bool(value) and all(
        isinstance(each, Mapping) and (not each.keys().isdisjoint(SPEAKER_KEYS) or is_pair(each))
        for each in value
    )
