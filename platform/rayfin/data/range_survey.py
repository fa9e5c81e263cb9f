"""What some ranges of large files contain, of which only a few samples are kept."""

from __future__ import annotations

import hashlib
import heapq
import itertools
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rayfin.data.content_hash import EVAL_SALT, ORDER_SALT, content_hashes
from rayfin.data.conversion import RowStatistics
from rayfin.data.file_ranges import read_range
from rayfin.data.row_settings import RowSettings
from rayfin.data.rows import BadRow
from rayfin.data.stream import FileRange, RowChoice, order_number

MAX_HELD_OUT = 1000
"""The most samples held out of a streamed data set: each evaluation scores them all."""

SAMPLED = 500
"""The number of training samples that stand for all of them in the data's profile."""

GREATEST_HASH = "f" * 64
_HASHES_KEPT = MAX_HELD_OUT + SAMPLED + 1
_BATCH_ROWS = 32  # what a processor's cache holds


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
        rows = read_range(ranges[number], settings)
        while batch := list(itertools.islice(rows, _BATCH_ROWS)):
            contents, prompts = list[str](), list[str]()
            for row in batch:
                example = survey.statistics.convert(row, shape)
                if isinstance(example, str):
                    survey.bad += 1
                    survey.first_bad = survey.first_bad or (number, row.line, example)
                    continue
                content, prompt = example.canonical_forms()
                if counts_here is None or counts_here(content, prompt):
                    contents.append(content)
                    prompts.append(prompt)
            count += len(contents)
            digest.update("".join([f"{content}\n" for content in contents]).encode())
            hashes = content_hashes(ORDER_SALT, contents)
            survey.source = min([survey.source, *hashes])
            if with_orders:
                orders.extend(map(order_number, hashes))
            hashes = content_hashes(EVAL_SALT, contents)
            survey.found |= wanted.intersection(hashes)
            by_content.add(number, hashes, contents)
            by_prompt.add(number, content_hashes(EVAL_SALT, prompts), contents)
        survey.counts[number], survey.digests[number] = count, digest.hexdigest()
        if with_orders:
            survey.orders[number] = orders
    survey.by_prompt, survey.by_content = by_prompt.smallest(), by_content.smallest()
    return survey


class _SmallestHashes:
    """Collects the examples with the smallest hashes, holding a few times as many at most."""

    def __init__(self) -> None:
        self._held: list[HashedExample] = []
        self._largest = GREATEST_HASH

    def add(self, number: int, hashes: Sequence[str], contents: Sequence[str]) -> None:
        """Add the contents of the range with this number that have these hashes."""
        pairs = zip(hashes, contents, strict=True)
        self._held += [HashedExample(h, number, c) for h, c in pairs if h <= self._largest]
        if len(self._held) > 4 * _HASHES_KEPT:
            self._held = self.smallest()
            self._largest = self._held[-1].hash

    def smallest(self) -> list[HashedExample]:
        return heapq.nsmallest(_HASHES_KEPT, self._held)
