"""One sample, as a conversation or a text, and as token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import orjson

ChatTurn = dict[str, Any]
"""One turn of a conversation: `role` (system, user, assistant or tool) and `content`, a string.

An assistant's turn may have `tool_calls`, a list of objects with `type` (function), `function`
(an object of `name` and `arguments`, an object too), and `id` where the data has one; its content
is empty where it says nothing beside them. A tool's turn, which answers a call, may have `name` and
`tool_call_id`.
"""

Tool = dict[str, Any]
"""A function that a model may call, as JSON schema: `type` (function) and `function`."""


@dataclass(frozen=True)
class Example:
    """One sample: a conversation that ends with an assistant turn, or a plain text."""

    messages: tuple[ChatTurn, ...] = ()
    text: str | None = None
    unlearned: tuple[int, ...] = ()
    """Indices of the assistant turns before the last one that are excluded from the loss."""
    rejected: tuple[ChatTurn, ...] = ()
    """A preference pair's conversation with the rejected answer; empty for every other row."""
    tools: tuple[Tool, ...] = ()
    """The functions that the assistant may call."""

    @property
    def uses_tools(self) -> bool:
        """Whether tools are offered, called, or answer."""
        turns = (*self.messages, *self.rejected)
        return bool(self.tools) or any("tool_calls" in t or t["role"] == "tool" for t in turns)

    def canonical(self) -> str:
        """Return the content as JSON, which is the same for equal samples of any file."""
        if self.text is not None:
            return _canonical_text(self.text)
        if not (self.unlearned or self.rejected or self.tools) and (
            plain := _canonical_turns(self.messages)
        ):
            return plain
        messages = _with_texts(self.messages)
        more = {
            "unlearned": self.unlearned,
            "rejected": _with_texts(self.rejected),
            "tools": [_ordered(tool) for tool in self.tools],
        }
        if used := {name: value for name, value in more.items() if value}:
            return _canonical({"messages": messages} | used)
        return _canonical(messages)

    @classmethod
    def from_canonical(cls, canonical: str) -> Example:
        """Return the example whose `canonical()` is the given text."""
        match json.loads(canonical):
            case str(text):
                return cls(text=text)
            case dict(fields):
                return cls(
                    messages=_with_objects(fields["messages"]),
                    unlearned=tuple(fields.get("unlearned", ())),
                    rejected=_with_objects(fields.get("rejected", ())),
                    tools=tuple(map(json.loads, fields.get("tools", ()))),
                )
            case messages:
                return cls(messages=_with_objects(messages))

    def canonical_prompt(self) -> str:
        """Return the content before the last answer as JSON; for a plain text, all of it."""
        if self.text is not None:
            return _canonical_text(self.text)
        turns = self.messages[:-1]
        return _canonical_turns(turns) or _canonical(_with_texts(turns))

    def canonical_forms(self) -> tuple[str, str]:
        """Return `canonical()` and `canonical_prompt()`."""
        return self.canonical(), self.canonical_prompt()


NO_LOSS = -100
"""The label that PyTorch's cross entropy ignores."""


class TokenizedSample(TypedDict):
    """One sample as token ids; `labels` are the same ids where there is loss, else -100.

    An objective may add lists of its own.
    """

    input_ids: list[int]
    labels: list[int]


_quoted = json.encoder.encode_basestring_ascii
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def _canonical(value: object) -> str:
    return _ENCODER.encode(value)


def _canonical_text(text: str) -> str:
    return _ascii_json(text) or _quoted(text)


def _canonical_turns(turns: Sequence[ChatTurn]) -> str | None:
    """Return the canonical form of turns that have a content and a role alone, None for others.

    It is what the encoder would write, in a fraction of the time.
    """
    for turn in turns:
        if len(turn) != 2:
            return None
    if written := _ascii_json(turns):
        return written
    texts = [
        f'{{"content":{_quoted(turn["content"])},"role":{_quoted(turn["role"])}}}' for turn in turns
    ]
    return f"[{','.join(texts)}]"


def _ascii_json(texts: object) -> str | None:
    """Return texts, or objects of them, as canonical JSON; None where they are not all ASCII.

    The encoder writes the same, but takes ten times as long; orjson escapes nothing beyond ASCII,
    and not the control character DEL.
    """
    try:
        written = orjson.dumps(texts, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError:  # half of a character
        return None
    return written.decode() if written.isascii() and b"\x7f" not in written else None


# Templates write tools and arguments in the order of their keys, which the canonical form would
# sort; there they are JSON texts, as OpenAI writes arguments.
def _ordered(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _with_texts(messages: Sequence[ChatTurn]) -> Sequence[ChatTurn]:
    def written(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return call | {"function": function | {"arguments": _ordered(function["arguments"])}}

    return _with_calls(messages, written)


def _with_objects(messages: Sequence[ChatTurn]) -> tuple[ChatTurn, ...]:
    def restored(call: dict[str, Any]) -> dict[str, Any]:
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        own = {"id": call["id"]} if "id" in call else {}
        function = {"name": name, "arguments": arguments}
        return {**own, "type": call["type"], "function": function}

    return tuple(_with_calls(messages, restored))


def _with_calls(
    messages: Sequence[ChatTurn], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> Sequence[ChatTurn]:
    """Return the turns with their tool calls changed."""
    if not any("tool_calls" in message for message in messages):
        return messages
    return [
        message | {"tool_calls": [change(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]
