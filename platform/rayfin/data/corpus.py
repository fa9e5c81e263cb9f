"""A data set that has been read and split."""

from __future__ import annotations

from dataclasses import dataclass, field

from rayfin.data.mixture import SourceUse
from rayfin.data.rows import BadRow
from rayfin.data.splits import HELD_OUT
from rayfin.data.stream import Stream
from rayfin.samples import Example


@dataclass(frozen=True)
class Corpus:
    """The samples of one data set, divided into a training and an evaluation split."""

    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    shape: str
    """The format of the rows, as `data.format` names it; of several, each once, with commas."""
    digest: str
    """A hash of both splits and their order."""
    source: str
    """A hash of the data that is the same for every subset and every split of it."""
    skipped: tuple[BadRow, ...] = ()
    """Bad rows that were left out; for streamed data, only the first of each split."""
    eval_split: str = HELD_OUT
    """The name of the split that `eval` was taken from."""
    eval_rows_in_train: int = 0
    """The number of samples of `eval` that also occur in the training data."""
    sources: tuple[SourceUse, ...] = ()
    """What is taken of each of data.sources; empty for data.path."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What the user should know about how the data was read, one line each."""
    stream: Stream | None = None
    """Where training reads its samples from, if `train` is only a sample of them."""

    @property
    def rows(self) -> int:
        """The number of training samples, of streamed data too, before any is cut to nothing."""
        return len(self.train) if self.stream is None else sum(self.stream.rows)

    @property
    def skipped_rows(self) -> int:
        """The number of bad rows that were left out."""
        if self.stream is not None:
            return self.stream.bad_rows
        return sum(bad.rows for bad in self.skipped)
