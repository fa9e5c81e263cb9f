"""Read the turns of a conversation as data sets write them, and which of them are learned."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from rayfin.data.columns import (
    CALL_KEYS,
    CONTENT_KEYS,
    LEARN_KEYS,
    PAIR_KEYS,
    RESULT_KEYS,
    SPEAKER_KEYS,
    SPEAKERS,
    is_blank,
    is_missing,
)
from rayfin.data.row_reader import RowProblem, RowReader, UnsupportedContent
from rayfin.data.tool_calls import calls_of
from rayfin.samples import ChatTurn, Example

_MORE_KEYS = {"assistant": CALL_KEYS, "tool": RESULT_KEYS}
"""The keys that only the turns of some roles have."""

_SAID_KEYS = (*CONTENT_KEYS, *CALL_KEYS)
_PART_KEYS = frozenset(("type", "text"))
_TEXT_PARTS = ("text", "input_text", "output_text")
_KINDS = {str: "a string", bool: "a boolean", list: "a list", dict: "an object", type(None): "null"}


class Turn(NamedTuple):
    """One turn; `learned` says whether an assistant's turn has loss."""

    role: str
    content: str
    learned: bool = True
    more: Mapping[str, Any] = {}
    """What a chat message has beside its role and content: tool calls, or which one it answers."""

    def message(self) -> ChatTurn:
        """Return the turn as a chat message."""
        return {"role": self.role, "content": self.content, **self.more}


def turns(value: object, column: str, reader: RowReader) -> list[Turn]:
    """Return the turns of a column, without the empty system turn that exports often have."""
    found: list[Turn] = []
    for number, turn in enumerate(as_list(value, column)):
        where = f"{column}[{number}]"
        if is_pair(turn):
            found += _pair(turn, column, where, reader)
        else:
            found.append(_turn(turn, column, where, reader))
    return [turn for turn in found if turn.role != "system" or turn.content.strip()]


def usual_conversation(value: object, reader: RowReader) -> Example | None:
    """Return the example of turns as most have them, or None for those that need a closer look.

    These are texts of a user and an assistant in alternation, without any other key: the rows of
    large data sets, which are read in a third of the time so.
    """
    if type(value) is not list or len(value) % 2 or not value or reader.settings.ignore:
        return None
    messages: list[ChatTurn] = []
    role, next_role = "user", "assistant"
    for turn in value:
        if type(turn) is not dict or len(turn) != 2:
            return None
        speaker, content = turn.get("role"), turn.get("content")
        if speaker is None:
            speaker, content = turn.get("from"), turn.get("value")
        if type(speaker) is not str or SPEAKERS.get(speaker) != role or not is_text(content):
            return None
        messages.append({"role": role, "content": content})
        role, next_role = next_role, role
    return Example(tuple(messages))


def question_and_answer(question: str, answer: str) -> Example:
    """Return the example of one question and its answer."""
    asked = {"role": "user", "content": question}
    return Example((asked, {"role": "assistant", "content": answer}))


def is_pair(turn: object) -> bool:
    """Whether an object holds a question and its answer, by keys such as human and assistant."""
    return (
        isinstance(turn, Mapping)
        and turn.keys().isdisjoint(SPEAKER_KEYS)
        and {"user", "assistant"} <= {PAIR_KEYS.get(key) for key in turn}
    )


def _pair(pair: Mapping[str, Any], column: str, where: str, reader: RowReader) -> list[Turn]:
    """Return the turns of a question and its answer, and of the system prompt beside them."""
    given = reader.keys(pair, column, {*PAIR_KEYS, "system", *LEARN_KEYS})
    said = {}
    for key, value in given.items():
        if key in LEARN_KEYS:
            continue
        role = PAIR_KEYS.get(key, key)
        if role in said:
            raise RowProblem(f"{where} has two keys for the {role}'s turn; give one of them")
        if role != "system" or not is_blank(value):
            said[role] = string(value, f"{where}.{key}")
    learned = _is_learned(given, "assistant", where)
    roles = [role for role in ("system", "user", "assistant") if role in said]
    return [Turn(role, said[role], learned or role != "assistant") for role in roles]


def conversation(said: Sequence[Turn], column: str) -> Example:
    """Return the example that ends with the last learned answer, as nothing after it is learned.

    Raises RowProblem where the turns are no conversation with an answer to learn.
    """
    if not said:
        raise RowProblem(f"{column} is empty")
    said = _with_one_system_turn(said)
    if any(turn.role == "system" for turn in said[1:]):
        raise RowProblem(
            f"{column} has a system turn that is not the first; put its words into the user turn "
            "after it"
        )
    before = ""
    for turn in said:
        if turn.role == "tool" and before not in ("assistant", "tool"):
            raise RowProblem(f"{column} has a tool turn that follows no assistant turn")
        before = turn.role
    if said[-1].role != "assistant":
        raise RowProblem(
            f"{column} ends with a {said[-1].role} turn, not an assistant turn; take out what "
            "follows the last answer"
        )
    said = _with_results_in_order(said, column)
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


def _with_results_in_order(said: Sequence[Turn], column: str) -> Sequence[Turn]:
    """Return the turns with the results of several calls in the order of the calls.

    Most templates write results without the id of their call, and tell them by their order. Raises
    RowProblem for a result of a call that is not among those before it.
    """
    found = list(said)
    for start, turn in enumerate(said):
        ids = [call.get("id") for call in turn.more.get("tool_calls", ())]
        if not ids or None in ids:
            continue
        end = start + 1
        while end < len(said) and said[end].role == "tool":
            end += 1
        results = said[start + 1 : end]
        named = [result.more.get("tool_call_id") for result in results]
        unknown = next((n for n, each in enumerate(named) if each and each not in ids), None)
        if unknown is not None:
            raise RowProblem(
                f"{column}[{start + 1 + unknown}].tool_call_id is {named[unknown]!r:.40}, and the "
                f"calls before it are {', '.join(map(str, ids)):.80}; give each result its call's"
            )
        if all(named):
            found[start + 1 : end] = sorted(
                results, key=lambda result: ids.index(result.more["tool_call_id"])
            )
    return found


def _with_one_system_turn(said: Sequence[Turn]) -> Sequence[Turn]:
    """Return the turns with the system turns that they begin with joined into one."""
    count = next((n for n, turn in enumerate(said) if turn.role != "system"), len(said))
    if count < 2:
        return said
    return [Turn("system", "\n\n".join(turn.content for turn in said[:count])), *said[count:]]


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


def is_conversation(value: list[Any]) -> bool:
    """Whether all items of a list are turns, with a speaker and what it says or calls."""
    return bool(value) and all(
        isinstance(each, Mapping)
        and (is_pair(each) or not any(map(each.keys().isdisjoint, (SPEAKER_KEYS, _SAID_KEYS))))
        for each in value
    )


def _turn(turn: object, column: str, where: str, reader: RowReader) -> Turn:
    if not isinstance(turn, Mapping):
        raise RowProblem(f"{where} must be an object, not {kind(turn)}")
    speaker_key, key = (_key(turn, keys, column) for keys in (SPEAKER_KEYS, CONTENT_KEYS))
    speaker = turn.get(speaker_key)
    role = SPEAKERS.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    calls = role == "call"
    role = "assistant" if calls else role
    given = reader.keys(turn, column, _used_keys(speaker_key, key, role))
    if is_missing(given.get(speaker_key)):
        raise RowProblem(f"{where}.{speaker_key} is missing")
    if role is None:
        allowed = ", ".join(SPEAKERS)
        raise RowProblem(f"{where}.{speaker_key} is {speaker!r:.40}; allowed are {allowed}")
    place = f"{where}.{key}"
    more = _more(given, role, column, where, reader)
    content = given.get(key)
    if is_missing(content):
        if not calls and "tool_calls" not in more:
            raise RowProblem(f"{place} is missing")
        content = ""
    if calls and "tool_calls" not in more:
        more["tool_calls"] = calls_of(content, f"{column}.{key}", place, reader)
        content = ""
    content = _text(content, f"{column}.{key}", place, reader)
    content = string(
        content, place, may_be_empty=role in ("system", "tool") or "tool_calls" in more
    )
    learned = _is_learned(given, role, where) if len(given) > 2 else True
    return Turn(role, content, learned, more)


@functools.cache
def _used_keys(speaker_key: str, content_key: str, role: str | None) -> frozenset[str]:
    more = _MORE_KEYS.get(role, ()) if role else ()
    return frozenset((speaker_key, content_key, *LEARN_KEYS, *more))


def _key(turn: Mapping[str, Any], keys: Sequence[str], column: str) -> str:
    """Return which of these keys a turn has a value at; where none, the one that is usual there."""
    usual = 1 if column == "conversations" else 0
    return next((key for key in keys if turn.get(key) is not None), keys[usual])


def _more(
    given: Mapping[str, Any], role: str, column: str, where: str, reader: RowReader
) -> dict[str, Any]:
    """Return the tool calls of an assistant's turn, or which call a tool's turn answers."""
    more: dict[str, Any] = {}
    if role == "assistant":
        for key in CALL_KEYS:
            if is_blank(given.get(key), text=True):
                continue
            if more:
                raise RowProblem(f"{where} has {' and '.join(CALL_KEYS)}; give one of them")
            more["tool_calls"] = calls_of(given[key], f"{column}.{key}", f"{where}.{key}", reader)
    elif role == "tool":
        for key in RESULT_KEYS:
            if not is_blank(given.get(key)):
                more[key] = string(given[key], f"{where}.{key}")
    return more


def _text(content: object, name: str, where: str, reader: RowReader) -> object:
    """Join parts of text by line breaks, as the server does; return other content as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for number, given in enumerate(content):
        part = {"text": given} if isinstance(given, str) else given
        if not isinstance(part, Mapping):
            raise RowProblem(f"{where}[{number}] must be an object, not {kind(part)}")
        if part.get("type") not in _TEXT_PARTS and (part.get("type") or "text" not in part):
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
        raise RowProblem(f"{where} must be a string, not {kind(value)}{as_text(value)}")
    if not may_be_empty and not value.strip():
        raise RowProblem(f"{where} is empty")
    if not value.isascii() and not _is_valid(value):
        raise RowProblem(f"{where} is not valid UTF-8 text")
    return value


def as_text(value: object) -> str:
    """Return how a value that is no text can be given as one, or an empty text for a missing one.

    It is not done here: of 1.50 and of an object, it is not known how the text is to be written.
    """
    if isinstance(value, (bool, int, float)):
        return f'; put it in quotes, as "{json.dumps(value)}"'
    return "; give the text that is meant, as a string" if isinstance(value, Mapping) else ""


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is text that can be learned."""
    if type(value) is not str or not value or value.isspace():
        return False
    return value.isascii() or _is_valid(value)


def _is_valid(text: str) -> bool:
    """Whether a text can be UTF-8, as the half of a surrogate pair that JSON can spell can't.

    No tokenizer takes such a text; undecodable bytes of a CSV arrive the same way.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def kind(value: object) -> str:
    """Return the kind of a value in the terms of JSON."""
    return _KINDS.get(type(value), "a number" if isinstance(value, (int, float)) else "an object")
