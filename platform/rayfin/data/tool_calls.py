"""Read the tools that a row offers, and the calls of them, in the forms that data sets have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rayfin.data.columns import CALL_KEYS
from rayfin.data.row_reader import RowProblem, RowReader
from rayfin.data.row_settings import NO_SETTINGS, RowSettings
from rayfin.samples import Tool

_OF_TOOLS = ("tools", "functions")
_CALL = frozenset(("id", "type", "function", "name", "arguments", "parameters"))
_FUNCTION = frozenset(("name", "arguments", "parameters"))


def tools_of(value: object, where: str) -> tuple[Tool, ...]:
    """Return the functions of a column `tools`: a list of them, or its JSON text.

    A function that stands for itself, as older data has it, is put into OpenAI's
    `{"type": "function", "function": ...}`. Raises RowProblem for what is no function.
    """
    listed = _parsed(value, where)
    if isinstance(listed, Mapping):
        listed = [listed]
    if not isinstance(listed, (list, tuple)):
        raise RowProblem(f"{where} must be a list of functions as JSON schema, or its JSON text")
    return tuple(_tool(each, f"{where}[{number}]") for number, each in enumerate(listed))


def _tool(value: object, where: str) -> Tool:
    tool = _parsed(value, where)
    if isinstance(tool, Mapping) and "function" not in tool and "name" in tool:
        tool = {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not _is_name(function.get("name")):
        raise RowProblem(
            f'{where} must be a function: {{"name": ..., "description": ..., "parameters": ...}}'
        )
    _check_text(tool, where)
    return dict(tool) if "type" in tool else {"type": "function", **tool}


def calls_of(value: object, name: str, where: str, reader: RowReader) -> list[dict[str, Any]]:
    """Return the tool calls of an assistant's turn in OpenAI's form, with arguments as objects.

    `value` is a list of calls, or one of them, or the JSON text of either; `name` is that of the
    key, as `reader` records it. Raises RowProblem for what is no call.
    """
    calls = _parsed(value, where)
    if isinstance(calls, Mapping):
        return [_call(calls, name, where, reader)]
    if not isinstance(calls, (list, tuple)) or not calls:
        raise RowProblem(f'{where} must be calls of tools: {{"name": ..., "arguments": ...}}')
    return [_call(call, name, f"{where}[{n}]", reader) for n, call in enumerate(calls)]


def _call(value: object, name: str, where: str, reader: RowReader) -> dict[str, Any]:
    call = _parsed(value, where)
    if not isinstance(call, Mapping):
        raise RowProblem(f'{where} must be a call of a tool: {{"name": ..., "arguments": ...}}')
    call = reader.keys(call, name, _CALL)
    if call.get("type") not in (None, "function"):
        raise RowProblem(f"{where}.type is {call['type']!r:.40}; allowed is function")
    function = call.get("function", call)
    if isinstance(function, Mapping) and function is not call:
        function = reader.keys(function, f"{name}.function", _FUNCTION)
    if not isinstance(function, Mapping) or not _is_name(function.get("name")):
        raise RowProblem(f"{where} names no function; give name and arguments")
    given = function.get("arguments", function.get("parameters"))
    arguments = None if given in (None, "") else _parsed(given, f"{where}.arguments")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise RowProblem(f"{where}.arguments must be an object, or its JSON text")
    _check_text(arguments, where)
    found = {"function": {"name": function["name"], "arguments": dict(arguments)}}
    own = {"id": call["id"]} if call.get("id") is not None else {}
    return {**own, "type": "function", **found}


def _parsed(value: object, where: str) -> Any:
    """Return a value as it is, or that of its JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RowProblem(f"{where} is no JSON: {value[:40]!r}") from None


def _check_text(value: object, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError):  # bytes or dates of a table, halves of characters
        raise RowProblem(f"{where} holds what is no JSON, or no valid UTF-8 text") from None


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def without_nulls_of_calls(
    row: dict[str, Any], settings: RowSettings = NO_SETTINGS
) -> dict[str, Any]:
    """Return a row of a table without the nulls in its tools and in its calls of tools.

    All objects of a table's column have the same keys, null where they were not given.
    """
    return {
        name: _without_nulls(value)
        if (settings.column_of(name) or name).strip().casefold() in _OF_TOOLS
        else [_with_plain_calls(each) for each in value]
        if isinstance(value, list)
        else value
        for name, value in row.items()
    }


def _with_plain_calls(turn: Any) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    return {k: _without_nulls(v) if k in CALL_KEYS else v for k, v in turn.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value
