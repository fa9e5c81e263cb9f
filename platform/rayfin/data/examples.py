"""One sample, as a conversation or a text and as tokens, and the hash of its content."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TypedDict

HELD_OUT = "held_out"
"""The name of the evaluation split where its rows were held out of the training data."""

# Changing a salt changes every split that was ever made: histories would no longer compare.
ORDER_SALT = "rayfin/order/1"
EVAL_SALT = "rayfin/eval/1"

ChatTurn = dict[str, str]
"""One turn of a conversation: `role` (system, user or assistant) and `content`."""


@dataclass(frozen=True)
class Example:
    """One sample: a conversation that ends with an assistant turn, or a plain text."""

    messages: tuple[ChatTurn, ...] = ()
    text: str | None = None
    unlearned: tuple[int, ...] = ()
    """Indices of the assistant turns before the last one that are excluded from the loss."""

    def canonical(self) -> str:
        """Return the content as JSON, which is the same for equal samples of any file."""
        if self.unlearned:
            return _canonical({"messages": self.messages, "unlearned": self.unlearned})
        return _canonical(self.text if self.text is not None else self.messages)

    @classmethod
    def from_canonical(cls, canonical: str) -> Example:
        """Return the example whose `canonical()` is the given text."""
        match json.loads(canonical):
            case str(text):
                return cls(text=text)
            case {"messages": messages, "unlearned": unlearned}:
                return cls(messages=tuple(messages), unlearned=tuple(unlearned))
            case messages:
                return cls(messages=tuple(messages))

    def canonical_prompt(self) -> str:
        """Return the content before the last answer as JSON; for a plain text, all of it."""
        return _canonical(self.text if self.text is not None else self.messages[:-1])


@dataclass(frozen=True)
class BadRow:
    """A row that can't be used, and why.

    Lines are counted from 1; in Parquet files and JSON arrays, rows are counted instead.
    """

    file: str
    line: int
    reason: str
    rows: int = 1
    """The number of rows lost with it: an open quote swallows the rows after it."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


NO_LOSS = -100
"""The label that PyTorch's cross entropy ignores."""


class TokenizedSample(TypedDict):
    """One sample as token ids; `labels` are the same ids where there is loss, else -100."""

    input_ids: list[int]
    labels: list[int]


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def _canonical(value: object) -> str:
    return _ENCODER.encode(value)


def content_hash(salt: str, content: str) -> str:
    """Return the SHA-256 of a salt and a content, as 64 hexadecimal digits."""
    return hashlib.sha256(f"{salt}\n{content}".encode()).hexdigest()
