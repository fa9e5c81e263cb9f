"""What some ranges of large files contain, of which only a few samples are kept."""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rayfin.data.content_hash import EVAL_SALT, ORDER_SALT, content_hash
from rayfin.data.conversion import RowStatistics
from rayfin.data.file_ranges import read_range
from rayfin.data.row_settings import RowSettings
from rayfin.data.rows import BadRow
from rayfin.data.stream import FileRange, RowChoice, order_number
from rayfin.samples import Example

MAX_HELD_OUT = 1000
"""The most samples held out of a streamed data set: each evaluation scores them all."""

SAMPLED = 500
"""The number of training samples that stand for all of them in the data's profile."""

GREATEST_HASH = "f" * 64
_HASHES_KEPT = MAX_HELD_OUT + SAMPLED + 1


class HashedExample(NamedTuple):
    """A sample in canonical form, the range that it is in, and the hash it is ordered by."""

    hash: str
    number: int
    content: str


@dataclass
class RangeSurvey:
    """What some file ranges contain, by their numbers; of the samples, only a few are kept."""

    counts: dict[int, int] = field(default_factory=dict)
    """The number of valid samples in each range."""
    digests: dict[int, str] = field(default_factory=dict)
    """A hash of the samples in each range."""
    by_prompt: list[HashedExample] = field(default_factory=list)
    """The samples with the smallest hashes of their prompts."""
    by_content: list[HashedExample] = field(default_factory=list)
    """The samples with the smallest hashes of their contents."""
    source: str = GREATEST_HASH
    """The smallest hash of the samples' order."""
    found: set[str] = field(default_factory=set)
    """Those of the wanted hashes that samples here have."""
    orders: dict[int, array[int]] = field(default_factory=dict)
    """The first 64 bits of each sample's order hash, for each range, where they are asked for."""
    bad: int = 0
    """The number of bad rows."""
    first_bad: tuple[int, int, str] | None = None
    """The first bad row: its range, its line in the range, and the reason."""
    first: BadRow | None = None
    """The first bad row with its line in the file; set once all ranges have been surveyed."""
    statistics: RowStatistics = field(default_factory=RowStatistics)

    def add(self, other: RangeSurvey) -> None:
        """Add the survey of later ranges to this one."""
        self.counts |= other.counts
        self.digests |= other.digests
        self.by_prompt = heapq.nsmallest(_HASHES_KEPT, self.by_prompt + other.by_prompt)
        self.by_content = heapq.nsmallest(_HASHES_KEPT, self.by_content + other.by_content)
        self.source = min(self.source, other.source)
        self.found |= other.found
        self.orders |= other.orders
        self.bad += other.bad
        self.statistics.add(other.statistics)
        self.first_bad = self.first_bad or other.first_bad


def survey_ranges(
    ranges: Sequence[FileRange],
    shape: str,
    settings: RowSettings,
    numbers: Sequence[int],
    wanted: frozenset[str] = frozenset(),
    *,
    chosen: Callable[[int], RowChoice] | None = None,
    with_orders: bool = False,
) -> RangeSurvey:
    """Survey the ranges of these numbers, looking for samples with the `wanted` content hashes.

    `chosen` returns what tells which samples of a range count; without it all do. `with_orders`
    keeps 8 bytes of each sample, by which they can be ordered.
    """
    survey = RangeSurvey(statistics=RowStatistics(settings))
    by_prompt, by_content = _SmallestHashes(), _SmallestHashes()
    for number in numbers:
        digest, count, orders = hashlib.sha256(), 0, array("Q")
        counts_here = None if chosen is None else chosen(number)
        for row in read_range(ranges[number], settings):
            example = survey.statistics.convert(row, shape)
            if not isinstance(example, Example):
                survey.bad += 1
                survey.first_bad = survey.first_bad or (number, row.line, example)
                continue
            content, prompt = example.canonical_forms()
            if counts_here is not None and not counts_here(content, prompt):
                continue
            count += 1
            digest.update(f"{content}\n".encode())
            order = content_hash(ORDER_SALT, content)
            survey.source = min(survey.source, order)
            if with_orders:
                orders.append(order_number(order))
            prompt_hash = content_hash(EVAL_SALT, prompt)
            by_prompt.add(HashedExample(prompt_hash, number, content))
            eval_hash = content_hash(EVAL_SALT, content)
            by_content.add(HashedExample(eval_hash, number, content))
            if eval_hash in wanted:
                survey.found.add(eval_hash)
        survey.counts[number], survey.digests[number] = count, digest.hexdigest()
        if with_orders:
            survey.orders[number] = orders
    survey.by_prompt, survey.by_content = by_prompt.smallest(), by_content.smallest()
    return survey


class _SmallestHashes:
    """Collects the examples with the smallest hashes, holding a few times as many at most."""

    def __init__(self) -> None:
        self._held: list[HashedExample] = []
        self._largest: HashedExample | None = None

    def add(self, example: HashedExample) -> None:
        if self._largest is None or example < self._largest:
            self._held.append(example)
            if len(self._held) > 4 * _HASHES_KEPT:
                self._held = self.smallest()
                self._largest = self._held[-1]

    def smallest(self) -> list[HashedExample]:
        return heapq.nsmallest(_HASHES_KEPT, self._held)
