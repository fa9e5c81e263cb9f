"""Refuse what a chat template would leave out of the text: questions, answers, tools and calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rayfin.data.token_settings import has_system
from rayfin.errors import DataError
from rayfin.samples import ChatTurn, Example, Tool

_MARK = "qzmarkqz"
_WAY_OUT = (
    "set data.chat_template to one that writes tools (hermes, llama3, mistral or a file of your "
    "own), or leave tools out of the data with data.ignore_columns=[tools] and without such turns"
)
_WRITES_TURNS = "use one that writes messages' role and content"


def check_turns(examples: Sequence[Example], render: Callable[[Example], str]) -> None:
    """Raise DataError where `render` writes the same for another question, or another answer.

    One sample with and one without a system message is looked at.
    """
    _check(examples, render, _CHANGES_OF_TURNS, _WRITES_TURNS)


def check_tools(examples: Sequence[Example], render: Callable[[Example], str]) -> None:
    """Raise DataError where `render` writes the same without a sample's tools, calls or results.

    Of those that have each of them, one with and one without a system message is looked at, and
    the same of those with several calls at once, as templates treat all others alike.
    """
    if any(example.uses_tools for example in examples):
        _check(examples, render, _CHANGES_OF_TOOLS, _WAY_OUT)


def _check(
    examples: Sequence[Example],
    render: Callable[[Example], str],
    changes: Mapping[str, Callable[[Example], Example | None]],
    remedy: str,
) -> None:
    for what, change in changes.items():
        found: dict[tuple[bool, bool], tuple[Example, Example]] = {}
        for example in examples:
            kind = (has_system(example.messages), _most_calls(example) > 1)
            if kind not in found and (changed := change(example)) is not None:
                found[kind] = (example, changed)
        for example, changed in found.values():
            try:
                written = render(example)
            except DataError:
                continue  # a conversation that the template refuses is told of as such
            try:
                same = render(changed) == written
            except DataError:
                same = False  # the template has looked at it
            if same:
                raise DataError(
                    f"data: the chat template leaves out {what} of the samples; {remedy}"
                )


def without_system(example: Example) -> Example | None:
    """Return the example without its system message, or None where it has none."""
    if not has_system(example.messages):
        return None
    unlearned = tuple(turn - 1 for turn in example.unlearned)
    return replace(example, messages=example.messages[1:], unlearned=unlearned)


def said_beside_calls(examples: Iterable[Example]) -> list[Example]:
    """Return the examples whose assistant says something beside a tool call."""
    return [example for example in examples if _without_words(example) is not None]


def leaves_out_words(example: Example, render: Callable[[Example], str]) -> bool:
    """Whether `render` leaves out what the assistant says beside the first such call."""
    silent = _without_words(example)
    return silent is not None and render(silent) == render(example)


def refuse_tools(
    conversations: Iterable[Sequence[ChatTurn]], tools: Iterable[Sequence[Tool]]
) -> None:
    """Raise DataError where a model without a chat template is given tools, calls or results."""
    if any(tools) or any(Example(messages=tuple(it)).uses_tools for it in conversations):
        raise DataError(
            f"data: the samples have tools, and the model has no chat template; {_WAY_OUT}"
        )


def _without_tools(example: Example) -> Example | None:
    return replace(example, tools=()) if example.tools else None


def _renamed_call(example: Example) -> Example | None:
    return _with_call(example, lambda function: {"name": _MARK})


def _changed_arguments(example: Example) -> Example | None:
    return _with_call(example, lambda function: {"arguments": {_MARK: 1}})


def _changed_result(example: Example) -> Example | None:
    return _with_turn(example, lambda turn: {"content": _MARK} if turn["role"] == "tool" else None)


def _without_words(example: Example) -> Example | None:
    def changed(turn: ChatTurn) -> dict[str, Any] | None:
        return {"content": ""} if turn.get("tool_calls") and turn["content"].strip() else None

    return _with_turn(example, changed)


def _with_call(example: Example, change: Callable[[Any], dict[str, Any]]) -> Example | None:
    """Return the example with the last call changed of the first turn that has the most calls."""
    most = _most_calls(example)

    def changed(turn: ChatTurn) -> dict[str, Any] | None:
        if not most or len(turn.get("tool_calls", ())) < most:
            return None
        *before, call = turn["tool_calls"]
        function = call["function"]
        return {"tool_calls": [*before, call | {"function": function | change(function)}]}

    return _with_turn(example, changed)


def _most_calls(example: Example) -> int:
    """Return the number of calls of the turn that has the most of them."""
    return max((len(turn.get("tool_calls", ())) for turn in example.messages), default=0)


def _with_turn(
    example: Example, change: Callable[[ChatTurn], dict[str, Any] | None]
) -> Example | None:
    """Return the example with the first turn for which there is a change, changed; else None."""
    for index, turn in enumerate(example.messages):
        if (new := change(turn)) is not None:
            before, after = example.messages[:index], example.messages[index + 1 :]
            return replace(example, messages=(*before, turn | new, *after))
    return None


def _changed_turn(role: str) -> Callable[[Example], Example | None]:
    """Return what changes the last turn of a role that says something, where there is one."""

    def change(example: Example) -> Example | None:
        said = [n for n, turn in enumerate(example.messages) if _says(turn, role)]
        if not said:
            return None
        before, turn = example.messages[: said[-1]], example.messages[said[-1]]
        after = example.messages[said[-1] + 1 :]
        return replace(example, messages=(*before, turn | {"content": _MARK}, *after))

    return change


def _says(turn: ChatTurn, role: str) -> bool:
    return turn["role"] == role and not turn.get("tool_calls") and bool(turn["content"].strip())


_CHANGES_OF_TURNS = {
    "the questions": _changed_turn("user"),
    "the answers": _changed_turn("assistant"),
}
_CHANGES_OF_TOOLS: dict[str, Callable[[Example], Example | None]] = {
    "the tools": _without_tools,
    "the tool calls": _renamed_call,
    "the arguments of tool calls": _changed_arguments,
    "the results of tools": _changed_result,
}
