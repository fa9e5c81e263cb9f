"""Read the turns of a conversation as data sets write them, and which of them are learned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rayfin.data.columns import (
    LEARN_KEYS,
    SPEAKERS,
    TOOL_SPEAKERS,
    TURN_KEYS,
    RowProblem,
    RowReader,
    UnsupportedContent,
    is_missing,
)
from rayfin.samples import ChatTurn, Example

_USED = {pair: frozenset((*pair, *LEARN_KEYS)) for pair in TURN_KEYS}
_PART_KEYS = frozenset(("type", "text"))
_KINDS = {str: "a string", bool: "a boolean", list: "a list", dict: "an object", type(None): "null"}


class Turn(NamedTuple):
    """One turn; `learned` says whether an assistant's turn has loss."""

    role: str
    content: str
    learned: bool = True

    def message(self) -> ChatTurn:
        """Return the turn as a chat message."""
        return {"role": self.role, "content": self.content}


def turns(value: object, column: str, reader: RowReader) -> list[Turn]:
    """Return the turns of a column, without the empty system turn that exports often have."""
    found = [
        _turn(turn, column, f"{column}[{number}]", reader)
        for number, turn in enumerate(as_list(value, column))
    ]
    return [turn for turn in found if turn.content.strip()]


def conversation(said: Sequence[Turn], column: str) -> Example:
    """Return the example that ends with the last learned answer, as nothing after it is learned.

    Raises RowProblem where the turns are no conversation with an answer to learn.
    """
    if not said:
        raise RowProblem(f"{column} is empty")
    if any(turn.role == "system" for turn in said[1:]):
        raise RowProblem(
            f"{column} has a system turn that is not the first; put its words into the user turn "
            "after it"
        )
    if said[-1].role != "assistant":
        raise RowProblem(
            f"{column} ends with a {said[-1].role} turn, not an assistant turn; take out what "
            "follows the last answer"
        )
    answers = [number for number, turn in enumerate(said) if turn.role == "assistant"]
    learned = [number for number in answers if said[number].learned]
    if not learned:
        raise RowProblem(f"{column} has no answer with weight 1: nothing of it would be learned")
    said = said[: learned[-1] + 1]
    asked = [number for number, turn in enumerate(said) if turn.role == "user"]
    if not asked:
        raise RowProblem(f"{column} has no user turn before the answer")
    # What is said before the first question isn't learned in any case.
    unlearned = [n for n in answers if asked[0] < n < learned[-1] and n not in learned]
    return Example(tuple(turn.message() for turn in said), unlearned=tuple(unlearned))


def as_list(value: object, column: str) -> Sequence[Any]:
    """Return a list of turns, also from its JSON text, which is all that a CSV cell can hold."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowProblem(f"{column} must be a list of turns, not a string") from None
    if not isinstance(value, (list, tuple)):
        raise RowProblem(f"{column} must be a list of turns, not {kind(value)}")
    return value


def _turn(turn: object, column: str, where: str, reader: RowReader) -> Turn:
    if not isinstance(turn, Mapping):
        raise RowProblem(f"{where} must be an object, not {kind(turn)}")
    pair = TURN_KEYS[1] if column == "conversations" else TURN_KEYS[0]
    pair = next((keys for keys in TURN_KEYS if turn.get(keys[0]) is not None), pair)
    given = reader.keys(turn, column, _USED[pair])
    speaker = given.get(pair[0])
    for key in pair[:1] if speaker in TOOL_SPEAKERS else pair:
        if is_missing(given.get(key)):
            raise RowProblem(f"{where}.{key} is missing")
    if speaker in TOOL_SPEAKERS:
        raise UnsupportedContent(
            f"{where}.{pair[0]} is {speaker!r}: tool calls can't be trained on yet; take such "
            "conversations out"
        )
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        allowed = ", ".join(SPEAKERS)
        raise RowProblem(f"{where}.{pair[0]} is {speaker!r:.40}; allowed are {allowed}")
    role, place = SPEAKERS[speaker], f"{where}.{pair[1]}"
    content = _text(given[pair[1]], f"{column}.{pair[1]}", place, reader)
    content = string(content, place, may_be_empty=role == "system")
    says = len(given) > len(pair)  # whether it is learned
    return Turn(role, content, _is_learned(given, role, where) if says else True)


def _text(content: object, name: str, where: str, reader: RowReader) -> object:
    """Join parts of text by line breaks, as the server does; return other content as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for number, part in enumerate(content):
        if not isinstance(part, Mapping):
            raise RowProblem(f"{where}[{number}] must be an object, not {kind(part)}")
        if part.get("type") != "text":
            raise UnsupportedContent(
                f"{where}[{number}].type is {part.get('type')!r:.40}: of the parts of a content "
                "only text can be trained on yet; take such conversations out"
            )
        text = reader.keys(part, name, _PART_KEYS).get("text")
        texts.append(string(text, f"{where}[{number}].text"))
    return "\n".join(texts)


def _is_learned(given: Mapping[str, Any], role: str, where: str) -> bool:
    """Whether a turn is learned: an assistant's is unless one of its keys says otherwise."""
    said = {key: given[key] for key in LEARN_KEYS if not is_missing(given.get(key))}
    for key, value in said.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RowProblem(f"{where}.{key} is {value!r:.40}; allowed are 0 (not learned) and 1")
        if value and role != "assistant":
            raise RowProblem(
                f"{where}.{key} is {value!r}, but of a {role} turn nothing can be learned; give 0, "
                "or leave it out"
            )
    if len({bool(value) for value in said.values()}) > 1:
        raise RowProblem(f"{where}: {' and '.join(said)} contradict each other; give one of them")
    return all(said.values())


def string(value: object, where: str, *, may_be_empty: bool = False) -> str:
    """Return a value that is text and can be learned; raises RowProblem for any other."""
    if not isinstance(value, str):
        raise RowProblem(f"{where} must be a string, not {kind(value)}")
    if not may_be_empty and not value.strip():
        raise RowProblem(f"{where} is empty")
    try:
        # JSON can spell half of a surrogate pair, which no tokenizer takes; undecodable bytes
        # of a CSV arrive the same way.
        value.encode()
    except UnicodeEncodeError:
        raise RowProblem(f"{where} is not valid UTF-8 text") from None
    return value


def kind(value: object) -> str:
    """Return the kind of a value in the terms of JSON."""
    return _KINDS.get(type(value), "a number" if isinstance(value, (int, float)) else "an object")
