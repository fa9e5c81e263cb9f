"""Samples in the forms that everything after reading works on: normal form, then tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from rayfin.data.stream import Stream

HELD_OUT = "held_out"
"""The name of the split that is evaluated on where rows are held out of training for it."""

ChatTurn = dict[str, str]
"""One turn: `role` (system, user or assistant) and `content`."""


@dataclass(frozen=True)
class Example:
    """One sample: a conversation whose last turn is the assistant's, or else plain text."""

    messages: tuple[ChatTurn, ...] = ()
    text: str | None = None
    unlearned: tuple[int, ...] = ()
    """Numbers of the assistant turns before the last one that are not to be learned."""

    def canonical(self) -> str:
        """The content as JSON that is the same for equal samples, whatever file they came from."""
        if self.unlearned:
            return _canonical({"messages": self.messages, "unlearned": self.unlearned})
        return _canonical(self.text if self.text is not None else self.messages)

    @classmethod
    def from_canonical(cls, canonical: str) -> Example:
        """The example whose `canonical` it is."""
        match json.loads(canonical):
            case str(text):
                return cls(text=text)
            case {"messages": messages, "unlearned": unlearned}:
                return cls(messages=tuple(messages), unlearned=tuple(unlearned))
            case messages:
                return cls(messages=tuple(messages))

    def canonical_prompt(self) -> str:
        """As `canonical`, without the last answer; of plain text all is taken."""
        return _canonical(self.text if self.text is not None else self.messages[:-1])


@dataclass(frozen=True)
class BadRow:
    """A row that can't be used; lines count from 1, in Parquet and JSON arrays rows do."""

    file: str
    line: int
    reason: str
    rows: int = 1
    """Rows that are lost with it: an open quote takes those after it along."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Corpus:
    """The samples of one data set, split."""

    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    shape: str
    digest: str
    """Identifies both splits and their order."""
    source: str
    """Names the data, however many of its samples were taken, and however they were split."""
    skipped: tuple[BadRow, ...] = ()
    """Bad rows that were left out; of streamed data only the first of each split."""
    eval_split: str = HELD_OUT
    """The name of the split that `eval` is of."""
    eval_rows_in_train: int = 0
    """Samples of `eval` that are in the training data, too."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What whoever brought the data should know of how it was read, a line each."""
    stream: Stream | None = None
    """Where the training samples are read while training; `train` is a sample of them then."""

    @property
    def skipped_rows(self) -> int:
        """Rows that were left out as bad."""
        if self.stream is not None:
            return self.stream.bad_rows
        return sum(bad.rows for bad in self.skipped)


NO_LOSS = -100
"""The label that PyTorch's cross entropy leaves out."""


class TokenizedSample(TypedDict):
    """One sample: `labels` equals `input_ids` where there is loss and is -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def _canonical(value: object) -> str:
    return _ENCODER.encode(value)
