"""Which sample of a large data set is trained on when, without ever holding the whole set.

Each sample of an optimizer step belongs to a *lane*. With n lanes, a lane takes every n-th file
range of the epoch's shuffled ranges, and the samples within a range in an order that is shuffled
anew. A sample is thus identified by its step and its lane: a worker reads only the ranges of its
own lanes, any number of workers trains the same steps, and a resumed trial continues each lane
where it stopped.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from rayfin.data.content_hash import EVAL_SALT, ORDER_SALT, content_hash
from rayfin.data.row_settings import NO_SETTINGS, RowSettings
from rayfin.samples import Example


@dataclass(frozen=True)
class FileRange:
    """The lines of a JSONL file that begin in bytes `start` to `stop`, or Parquet row groups."""

    file: str
    start: int
    stop: int
    source: int = 0
    """The number of the source that the file belongs to."""
    whole: bool = False
    """Whether this is all of a file that can't be read in parts."""

    @property
    def is_parquet(self) -> bool:
        """Whether `start` and `stop` are numbers of row groups rather than bytes."""
        return self.file.lower().endswith(".parquet")


RowChoice = Callable[[str, str], bool]
"""Called with the content and the prompt of each sample of a range, in order: whether it counts."""


@dataclass(frozen=True)
class TakenRows:
    """The samples that are taken of a weighted source: the first ones by their order's hash."""

    last: int
    """The first 64 bits of the hash of the last one."""
    number: int
    """The number of the last range, among those of the source, where samples of that hash are
    taken."""
    count: int
    """How many samples of that hash are taken in that range."""

    def of_range(self, number: int) -> RowChoice:
        """Return what tells which samples of the source's range `number` are taken."""
        equal = 0

        def is_taken(content: str, _: str) -> bool:
            nonlocal equal
            hashed = order_number(content_hash(ORDER_SALT, content))
            if hashed != self.last:
                return hashed < self.last
            equal += 1
            return (number, equal) <= (self.number, self.count)

        return is_taken


def order_number(hashed: str) -> int:
    """Return the first 64 bits of a hash, as an integer."""
    return int(hashed[:16], 16)


@dataclass(frozen=True)
class StreamSource:
    """How the rows of one source of streamed data are read, and which of them are trained on."""

    shape: str
    """The format of the rows, as `data.format` names it."""
    settings: RowSettings = NO_SETTINGS
    """How the rows are read."""
    eval_hash_limit: str = ""
    """Samples whose hash is at most this one are held out for evaluation; empty holds out none."""
    hashes_prompt: bool = False
    """Whether the prompt is hashed; where almost all prompts are equal, the whole sample is."""
    taken: TakenRows | None = None
    """The samples that are taken of a weighted source; None takes all."""
    held_elsewhere: frozenset[str] = frozenset()
    """The hashes of the prompts, or whole samples, that are held out of other sources."""
    first_range: int = 0
    """The number of its first range in the stream."""

    def trained(self, examples: Iterable[Example], number: int) -> Iterator[Example]:
        """Yield those samples of a range that are trained on; `number` is that in the stream."""
        is_taken = self._taken_of(number - self.first_range)
        for example in examples:
            content, prompt = example.canonical_forms()
            if is_taken(content, prompt) and not self.is_held_out(content, prompt):
                yield example

    def is_held_out(self, content: str, prompt: str) -> bool:
        """Whether a sample is held out for evaluation, here or of another source."""
        return self._is_held_here(content, prompt) or self._is_held_elsewhere(content, prompt)

    def shared_of_range(self, number: int) -> RowChoice:
        """Return what tells which samples of its range `number` are held out elsewhere alone."""
        is_taken = self._taken_of(number)

        def is_shared(content: str, prompt: str) -> bool:
            if not is_taken(content, prompt) or self._is_held_here(content, prompt):
                return False
            return self._is_held_elsewhere(content, prompt)

        return is_shared

    def _taken_of(self, number: int) -> RowChoice:
        return (lambda *_: True) if self.taken is None else self.taken.of_range(number)

    def _is_held_here(self, content: str, prompt: str) -> bool:
        hashed = prompt if self.hashes_prompt else content
        return content_hash(EVAL_SALT, hashed) <= self.eval_hash_limit

    def _is_held_elsewhere(self, content: str, prompt: str) -> bool:
        if not self.held_elsewhere:
            return False
        hashes = (content_hash(EVAL_SALT, each) for each in (prompt, content))
        return any(each in self.held_elsewhere for each in hashes)


@dataclass(frozen=True)
class Stream:
    """A streamed data set: its sources and their file ranges."""

    sources: tuple[StreamSource, ...]
    ranges: tuple[FileRange, ...]
    rows: tuple[int, ...]
    """The number of samples of each range that an epoch trains on."""
    bad_rows: int


@dataclass(frozen=True)
class SampleRange:
    """Samples `start` to `stop` of a file range, in the order in which `epoch` shuffles them.

    They are what `lane` trains on from step `step` on; `number` is the index of the range.
    """

    step: int
    lane: int
    number: int
    file_range: FileRange
    epoch: int
    start: int
    stop: int


def plan_sample_ranges(
    stream: Stream, *, lanes: Iterable[int], of: int, seed: int, first: int, last: int
) -> list[SampleRange]:
    """Return what `lanes` read for steps `first` to `last` (exclusive), in the order of need.

    `of` is the number of all lanes.
    """
    planned = [found for lane in lanes for found in _lane(stream, lane, of, seed, first, last)]
    return sorted(planned, key=lambda found: (found.step, found.lane))


def _lane(
    stream: Stream, lane: int, of: int, seed: int, first: int, last: int
) -> Iterator[SampleRange]:
    position = epoch = 0
    while position < last:
        # The lanes rotate by one each epoch: where there are fewer ranges than lanes, every lane
        # gets its turn.
        for number in _shuffled(len(stream.ranges), f"{seed}/{epoch}")[(lane - epoch) % of :: of]:
            rows, file_range = stream.rows[number], stream.ranges[number]
            start, stop = max(first - position, 0), min(last - position, rows)
            if start < stop:
                yield SampleRange(position + start, lane, number, file_range, epoch, start, stop)
            position += rows
        epoch += 1


def plan_epoch_ranges(
    stream: Stream, *, lanes: Iterable[int], of: int, seed: int, first: int, last: int
) -> list[SampleRange]:
    """Return what `lanes` read for steps `first` to `last` (exclusive), in passes over all samples.

    A pass has ceil(rows / of) steps. Each lane takes one piece of the samples of the pass's
    shuffled ranges, all pieces equally long or one sample longer; a lane with a shorter piece has
    no sample in the last step of the pass (`has_sample`).
    """
    rows = sum(stream.rows)
    steps, (length, longer) = -(-rows // of), divmod(rows, of)
    planned: list[SampleRange] = []
    for epoch in range(first // steps, -(-last // steps)):
        begin = epoch * steps
        order = _shuffled(len(stream.ranges), f"{seed}/{epoch}")
        starts = [0, *itertools.accumulate(stream.rows[number] for number in order)]
        for lane in lanes:
            low, high = (n * length + min(n, longer) for n in (lane, lane + 1))
            start, stop = low + max(first - begin, 0), min(high, low + last - begin)
            place = bisect.bisect_right(starts, start) - 1
            while start < stop:
                number, before = order[place], starts[place]
                place += 1
                end = min(stop, starts[place])
                if start < end:
                    file_range = stream.ranges[number]
                    step, inside = begin + start - low, (start - before, end - before)
                    planned.append(SampleRange(step, lane, number, file_range, epoch, *inside))
                    start = end
    return sorted(planned, key=lambda found: (found.step, found.lane))


def has_sample(rows: int, step: int, lane: int, of: int) -> bool:
    """Return whether a lane of `plan_epoch_ranges` has a sample in a step."""
    last = step % -(-rows // of) == (rows - 1) // of
    return not (last and rows % of and lane >= rows % of)


@functools.lru_cache(maxsize=4)
def _shuffled(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
