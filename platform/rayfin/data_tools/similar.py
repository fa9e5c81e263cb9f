"""Find rows whose texts are similar, by buckets of equal bands, and check what is found there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayfin.data_tools.minhash import (
    NUM_PERM,
    Signatures,
    estimated,
    jaccard,
    shingle_hashes,
)
from rayfin.data_tools.spill import Spill

_MOST_IN_BUCKET = 500
_MOST_CHECKED = 20
"""Bounds on the work for one row, which only rows meet that share much text with many others."""
_ERRORS = 4
"""How many standard errors below the threshold an estimate may be for a pair to be checked."""
_CACHED_TEXTS = 64
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
    """The rows that matched none of those they were compared with, where more were possible."""

    @classmethod
    def none(cls, rows: int) -> Matches:
        """Return matches of rows of which none has one yet."""
        return cls(np.full(rows, -1), np.zeros(rows), np.zeros(rows, bool))


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
    buckets = _Buckets(signatures.bands, rows)
    margin = _ERRORS * (threshold * (1 - threshold) / NUM_PERM) ** 0.5
    shingles = lru_cache(_CACHED_TEXTS)(lambda row: _shingles(texts, row))
    for place, own in buckets:
        row = int(rows[place])
        if references is None or place >= references:
            places, complete = buckets.earlier(own)
            others = rows[places]
            near = estimated(signatures.low_bytes[row], signatures.low_bytes[others])
            best = np.argsort(-near, kind="stable")[: np.count_nonzero(near >= threshold - margin)]
            for other in others[best[:_MOST_CHECKED]].tolist():
                similarity = jaccard(shingles(row), shingles(other))
                if similarity >= threshold:
                    matches.other[row], matches.similarity[row] = other, similarity
                    break
            else:
                matches.incomplete += not complete or len(best) > _MOST_CHECKED
            if matches.other[row] >= 0:
                continue
        if references is None or place < references:
            buckets.add(place, own)


def _shingles(texts: Spill, row: int) -> NDArray[np.uint64]:
    """Return the different shingles of a row's text, sorted."""
    return np.unique(shingle_hashes(texts[row].decode("utf-8", "surrogatepass")))


class _Buckets:
    """The buckets of two rows or more, each of which begins with the rows that were added.

    Rows are given as their places in `rows`.
    """

    def __init__(self, bands: NDArray[np.uint32], rows: _Rows) -> None:
        members, sizes = [], []
        for band in bands.T:
            keys = band[rows]
            order = np.argsort(keys, kind="stable")
            starts = _starts(keys[order])
            counts = np.diff(np.append(starts, len(keys)))
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

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.int32]]]:
        """Yield each row that shares a bucket with another one, in order, with its buckets."""
        ends = np.append(self._first, len(self._bucket))[1:]
        for row, first, end in zip(self._rows, self._first, ends, strict=True):
            yield int(row), self._bucket[first:end]

    def earlier(self, buckets: NDArray[np.int32]) -> tuple[NDArray[np.int32], bool]:
        """Return the rows added to some buckets, in order, and whether these are all of them."""
        found = []
        complete = True
        for start, added in zip(
            self._starts[buckets].tolist(), self._added[buckets].tolist(), strict=True
        ):
            if added:
                skipped = max(added - _MOST_IN_BUCKET, 0)
                complete = complete and not skipped
                found.append(self._members[start + skipped : start + added])
        if not found:
            return self._members[:0], complete
        return np.unique(np.concatenate(found)), complete

    def add(self, row: int, buckets: NDArray[np.int32]) -> None:
        """Add a row to its buckets; they hold no more rows than have been looked at."""
        self._members[self._starts[buckets] + self._added[buckets]] = row
        self._added[buckets] += 1


def _starts(ordered: NDArray[Any]) -> NDArray[np.int64]:
    """Return where each run of equal numbers begins."""
    new = np.ones(len(ordered), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return np.flatnonzero(new)
