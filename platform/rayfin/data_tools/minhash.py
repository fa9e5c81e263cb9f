"""MinHash signatures of texts, and the Jaccard similarity that they estimate.

Texts are compared as sets of overlapping sequences of five characters (shingles), which needs no
words and so no language. Case, white space and the forms of a character (Unicode's NFKC) make no
difference. A Chinese, Japanese or Korean character counts as two, as it says about as much.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

NUM_PERM = 128
"""The permutations of a signature: an estimated similarity has a standard error of 0.04 at 0.8."""

_SHINGLE = 5
_FILLER = "\0"
_COUNTS_TWICE = re.compile(
    "[\u2e80-\u2fdf\u3040-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff]"
)
_HASHED_AT_ONCE = 4096
"""The shingles whose permutations are held at once, which fit into a processor's cache."""
_LEAST_RECALL = 0.98
FACTORS = np.random.default_rng(0).integers(2**64, size=(NUM_PERM, 2), dtype=np.uint64) | 1


class Signatures(NamedTuple):
    """What is kept of the texts of some rows, in their order, to find similar ones."""

    bands: NDArray[np.uint32]
    """(rows, bands): a hash of each band. Rows of which one is equal may be similar."""
    low_bytes: NDArray[np.uint8]
    """(rows, NUM_PERM): the lowest byte of each minimum, by which similarity is estimated."""

    @classmethod
    def joined(cls, parts: Sequence[Signatures]) -> Signatures:
        """Return the signatures of all rows of some parts, in order."""
        return cls(*map(np.concatenate, zip(*parts, strict=True)))


def band_sizes(threshold: float) -> tuple[int, int]:
    """Return (bands, minima in each) by which texts of `threshold` similarity are found.

    Two texts of similarity s have an equal band with the probability 1 - (1 - s^r)^b, for b bands
    of r minima (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3). The largest
    r is chosen that finds 98 % of the pairs just at the threshold, and so more of those above.
    """
    found = [
        (NUM_PERM // r, r)
        for r in range(1, NUM_PERM + 1)
        if 1 - (1 - threshold**r) ** (NUM_PERM // r) >= _LEAST_RECALL
    ]
    return found[-1]


class MinHasher:
    """Makes signatures of texts for one similarity threshold."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHash

        # The one value of a batch is the array of all hashes: hashing each by itself, as MinHash
        # does otherwise, takes five times as long.
        self._minhash = MinHash(NUM_PERM, hashfunc=_unchanged)
        self._bands, self._rows = band_sizes(threshold)

    def signatures(self, texts: Sequence[str]) -> Signatures:
        """Return the signatures of texts, which is the same one for all that are blank."""
        values = np.empty((len(texts), NUM_PERM), np.uint32)
        for number, text in enumerate(texts):
            values[number] = self._minima(shingle_hashes(text))
        used = values[:, : self._bands * self._rows].astype(np.uint64)
        mixed = used.reshape(-1, self._bands, self._rows) * FACTORS[: self._rows, 0]
        bands = (mixed.sum(axis=2, dtype=np.uint64) >> np.uint64(32)).astype(np.uint32)
        return Signatures(bands, values.astype(np.uint8))

    def _minima(self, hashes: NDArray[np.uint64]) -> Any:
        short = (hashes >> np.uint64(32)).astype(np.uint32)
        self._minhash.clear()
        for start in range(0, len(short), _HASHED_AT_ONCE):
            self._minhash.update_batch([short[start : start + _HASHED_AT_ONCE]])
        return self._minhash.hashvalues


def _unchanged(hashes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    return hashes


def shingle_hashes(text: str) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each shingle of a text, in order; there is none in a blank one.

    A text of less than five characters is one shingle. The hash is multilinear (Lemire and Kaser,
    Strongly universal string hashing is fast, 2014), in which the upper half is the better one.
    """
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    plain = " ".join(plain.casefold().split())
    if not plain.isascii():
        plain = _COUNTS_TWICE.sub(rf"\g<0>{_FILLER}", plain)
    codes = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    if 0 < len(codes) < _SHINGLE:
        codes = np.pad(codes, (0, _SHINGLE - len(codes)))
    count = max(len(codes) - _SHINGLE + 1, 0)
    hashes = np.full(count, FACTORS[_SHINGLE, 1])
    for place in range(_SHINGLE):
        hashes += codes[place : place + count] * FACTORS[place, 1]
    return hashes


def jaccard(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> float:
    """Return how many shingles two texts share, of all that either has; 0 where neither has any.

    Each is given as the sorted, different hashes of its shingles.
    """
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / max(len(first) + len(second) - shared, 1)


def estimated(own: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the estimated similarities of one row to others, by the low bytes of each.

    The bytes of different minima are equal by chance once in 256 times, which is allowed for
    (Li and König, b-bit minwise hashing, 2010).
    """
    equal: NDArray[np.float64] = (others == own).mean(axis=1)
    return (equal - 1 / 256) / (1 - 1 / 256)
