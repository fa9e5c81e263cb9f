"""Find rows whose texts are similar, by buckets of equal bands, and check what is found there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayfin.data_tools.minhash import (
    FACTORS,
    NUM_PERM,
    Signatures,
    estimated,
    jaccard,
    shingle_hashes,
)
from rayfin.data_tools.spill import Spill

_MOST_IN_BUCKET = 100
_MOST_CHECKED = 10
"""Bounds on the work for one row, which only rows meet that share much text with many others."""
_ERRORS = 4
"""How many standard errors below the threshold an estimate may be for a pair to be checked."""
_MOST_CACHED = 2**25
"""The bytes of texts' shingles that are held for the rows after these."""
_OBJECT = 256
"""The bytes of an array and its place in a cache, without its elements."""
_MIXING = np.uint64(0x9E3779B97F4A7C15)
_Rows = NDArray[np.int64]


@dataclass
class Matches:
    """For each row, the row that it duplicates."""

    other: _Rows
    """Its number, or -1."""
    similarity: NDArray[np.float64]
    """The Jaccard similarity of the two texts, 1 for equal rows."""
    equal: NDArray[np.bool_]
    """Whether the two are equal."""
    incomplete: int = 0
    """The rows without a match that share text with too many others to be compared with them all.
    """

    @classmethod
    def none(cls, rows: int) -> Matches:
        """Return matches of rows of which none has one yet."""
        return cls(np.full(rows, -1), np.zeros(rows), np.zeros(rows, bool))

    def pass_on(self) -> None:
        """Give rows that are equal to one with a match that match, as that one isn't kept."""
        equal = np.flatnonzero(self.equal)
        first = self.other[equal]
        passed = self.other[first] >= 0
        equal, first = equal[passed], first[passed]
        self.other[equal], self.similarity[equal] = self.other[first], self.similarity[first]
        self.equal[equal] = False


def match_equal(
    matches: Matches, rows: _Rows, references: int | None, digests: NDArray[np.uint64]
) -> None:
    """Match each of some rows with the first one that has the same digest.

    `digests` has two integers for each row that there is. With `references`, rows are compared with
    the first `references` ones of `rows` alone, and these with none.
    """
    own = digests[rows]
    order = np.lexsort((own[:, 1], own[:, 0]))  # stable: of equal ones, the first comes first
    own = own[order]
    new = np.ones(len(order), bool)
    new[1:] = (own[1:] != own[:-1]).any(axis=1)
    first = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    found = ~new
    if references is not None:
        found = (order >= references) & (first < references)
    equal = rows[order[found]]
    matches.other[equal], matches.similarity[equal] = rows[first[found]], 1
    matches.equal[equal] = True


def match_similar(
    matches: Matches,
    rows: _Rows,
    references: int | None,
    signatures: Signatures,
    texts: Spill,
    threshold: float,
) -> None:
    """Match each of some rows with a similar one before it that has no match.

    `signatures` and `texts` are those of all rows that there are. With `references`, rows are
    compared with the first `references` ones of `rows` alone, and these with none. What is recorded
    is the similarity of the whole texts, no estimate.
    """
    if references is not None:
        rows, references = _first_of_same(rows, references, signatures)
    buckets = _Buckets(signatures.bands, rows, len(rows) if references is None else references)
    margin = _ERRORS * (threshold * (1 - threshold) / NUM_PERM) ** 0.5
    shingles = _Shingles(texts)
    for place, own in buckets:
        row = int(rows[place])
        if references is None or place >= references:
            others = rows[buckets.earlier(own)]
            near = estimated(signatures.low_bytes[row], signatures.low_bytes[others])
            best = np.argsort(-near, kind="stable")[: np.count_nonzero(near >= threshold - margin)]
            for other in others[best[:_MOST_CHECKED]].tolist():
                similarity = jaccard(shingles(row), shingles(other))
                if similarity >= threshold:
                    matches.other[row], matches.similarity[row] = other, similarity
                    break
            else:
                matches.incomplete += bool(buckets.divided[place]) or len(best) > _MOST_CHECKED
            if matches.other[row] >= 0:
                continue
        if references is None or place < references:
            buckets.add(place, own)


def _first_of_same(rows: _Rows, references: int, signatures: Signatures) -> tuple[_Rows, int]:
    """Return the rows, and how many of them are references, of which one has each signature."""
    words = signatures.low_bytes.view(np.uint64)
    hashes = words[rows[:references]] @ FACTORS[: words.shape[1], 0]
    first = np.sort(np.unique(hashes, return_index=True)[1])
    return np.concatenate((rows[first], rows[references:])), len(first)


class _Shingles:
    """The different shingles of rows' texts, sorted, of which those used last are held."""

    def __init__(self, texts: Spill) -> None:
        self._texts = texts
        self._held: dict[int, NDArray[np.uint64]] = {}
        self._bytes = 0

    def __call__(self, row: int) -> NDArray[np.uint64]:
        found = self._held.pop(row, None)
        if found is None:
            text = self._texts[row].decode("utf-8", "surrogatepass")
            found = np.unique(shingle_hashes(text))
            self._bytes += found.nbytes + _OBJECT
        self._held[row] = found
        while self._bytes > _MOST_CACHED and len(self._held) > 1:
            self._bytes -= self._held.pop(next(iter(self._held))).nbytes + _OBJECT
        return found


class _Buckets:
    """The buckets of two rows or more, each of which begins with the rows that were added.

    Rows are given as their places in `rows`.
    """

    def __init__(self, bands: NDArray[np.uint32], rows: _Rows, most: int) -> None:
        """Find the buckets of `rows`, of which at most the first `most` will be added."""
        self._may_be_added = np.arange(len(rows)) < most
        self.divided = np.zeros(len(rows), bool)
        """Whether a row is in a bucket that was so large that it was divided."""
        members, sizes = [], []
        for number in range(bands.shape[1]):
            order, counts = self._of_band(bands, rows, number)
            members.append(order[np.repeat(counts > 1, counts)].astype(np.int32))
            sizes.append(counts[counts > 1])
        self._members, counts = np.concatenate(members), np.concatenate(sizes)
        del members
        self._starts = np.cumsum(counts) - counts
        self._added = np.zeros(len(counts), np.int64)
        by_row = np.argsort(self._members, kind="stable")
        self._bucket = np.repeat(np.arange(len(counts), dtype=np.int32), counts)[by_row]
        ordered = self._members[by_row]
        self._first = _starts(ordered)
        self._rows = ordered[self._first]

    def _of_band(
        self, bands: NDArray[np.uint32], rows: _Rows, number: int
    ) -> tuple[_Rows, NDArray[np.int64]]:
        """Return the rows in the order of their buckets of one band, and the size of each bucket.

        A bucket to which many rows may be added is divided by further bands until each part is
        small enough, or all of its rows have all bands in common: what is much more similar than
        the rest stays together.
        """
        keys = bands[rows, number].astype(np.uint64)
        for more in range(1, bands.shape[1] + 1):
            order = np.argsort(keys, kind="stable")
            starts = _starts(keys[order])
            counts = np.diff(np.append(starts, len(keys)))
            most = np.add.reduceat(self._may_be_added[order], starts, dtype=np.int64)
            large = order[np.repeat(most > _MOST_IN_BUCKET, counts)]
            if not len(large) or more == bands.shape[1]:
                break
            self.divided[large] = True
            further = bands[rows[large], (number + more) % bands.shape[1]]
            keys[large] = (keys[large] ^ (keys[large] >> np.uint64(29))) * _MIXING + further
        return order, counts

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.int32]]]:
        """Yield each row that shares a bucket with another one, in order, with its buckets."""
        ends = np.append(self._first, len(self._bucket))[1:]
        for row, first, end in zip(self._rows, self._first, ends, strict=True):
            yield int(row), self._bucket[first:end]

    def earlier(self, buckets: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the rows added to some buckets, in order."""
        starts, added = self._starts[buckets].tolist(), self._added[buckets].tolist()
        found = [self._members[n : n + count] for n, count in zip(starts, added, strict=True)]
        return np.unique(np.concatenate(found))

    def add(self, row: int, buckets: NDArray[np.int32]) -> None:
        """Add a row to its buckets; they hold no more rows than have been looked at."""
        self._members[self._starts[buckets] + self._added[buckets]] = row
        self._added[buckets] += 1


def _starts(ordered: NDArray[Any]) -> NDArray[np.int64]:
    """Return where each run of equal numbers begins."""
    new = np.ones(len(ordered), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return np.flatnonzero(new)
