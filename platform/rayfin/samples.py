"""One sample, as a conversation or a text, and as token ids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TypedDict

ChatTurn = dict[str, str]
"""One turn of a conversation: `role` (system, user or assistant) and `content`."""


@dataclass(frozen=True)
class Example:
    """One sample: a conversation that ends with an assistant turn, or a plain text."""

    messages: tuple[ChatTurn, ...] = ()
    text: str | None = None
    unlearned: tuple[int, ...] = ()
    """Indices of the assistant turns before the last one that are excluded from the loss."""
    rejected: tuple[ChatTurn, ...] = ()
    """A preference pair's conversation with the rejected answer; empty for every other row."""

    def canonical(self) -> str:
        """Return the content as JSON, which is the same for equal samples of any file."""
        more = {"unlearned": self.unlearned, "rejected": self.rejected}
        if used := {name: value for name, value in more.items() if value}:
            return _canonical({"messages": self.messages} | used)
        return _canonical(self.text if self.text is not None else self.messages)

    @classmethod
    def from_canonical(cls, canonical: str) -> Example:
        """Return the example whose `canonical()` is the given text."""
        match json.loads(canonical):
            case str(text):
                return cls(text=text)
            case dict(fields):
                return cls(
                    messages=tuple(fields["messages"]),
                    unlearned=tuple(fields.get("unlearned", ())),
                    rejected=tuple(fields.get("rejected", ())),
                )
            case messages:
                return cls(messages=tuple(messages))

    def canonical_prompt(self) -> str:
        """Return the content before the last answer as JSON; for a plain text, all of it."""
        return _canonical(self.text if self.text is not None else self.messages[:-1])


NO_LOSS = -100
"""The label that PyTorch's cross entropy ignores."""


class TokenizedSample(TypedDict):
    """One sample as token ids; `labels` are the same ids where there is loss, else -100.

    An objective may add lists of its own.
    """

    input_ids: list[int]
    labels: list[int]


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def _canonical(value: object) -> str:
    return _ENCODER.encode(value)
