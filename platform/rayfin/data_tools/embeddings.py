"""Find rows of which the texts' embeddings are similar, by comparing all pairs of them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from rayfin.data_tools.embedding_model import OPTION, EmbeddingModel
from rayfin.data_tools.similar import Matches
from rayfin.data_tools.spill import Spill
from rayfin.errors import ConfigError
from rayfin.redaction import printable
from rayfin.tables import output

if TYPE_CHECKING:
    import torch

DEFAULT_THRESHOLD = 0.95
"""The cosine similarity from which rows are similar unless the user gives another."""
_MOST_ROWS = 300_000
"""The most rows that are compared each with each, as the time grows with their square."""
_BATCH = 32
_BLOCK, _OTHERS = 1024, 8192
"""The rows on each side of a matrix product, whose result takes 32 MiB."""
_Rows = NDArray[np.int64]


class Embeddings:
    """The vectors of rows' texts, on disk as 16-bit numbers."""

    def __init__(self, model: EmbeddingModel, texts: Spill, directory: Path) -> None:
        """Prepare to embed `texts`, to all of which a file in `directory` will give room."""
        self._model, self._texts, self._directory = model, texts, directory
        self._vectors: NDArray[np.float16] | None = None
        self._done = np.zeros(0, bool)

    def embed(self, rows: _Rows, pairs: int) -> None:
        """Embed those of some rows that have not been yet; `pairs` are to be compared then."""
        from rich.progress import track
        from rich.text import Text

        if self._vectors is None:
            shape = len(self._texts), self._model.size
            with tempfile.TemporaryFile(dir=self._directory) as file:  # the map keeps it open
                # Without room, writing to the map would kill the process.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, 2 * shape[0] * shape[1])
                else:
                    os.truncate(file.fileno(), 2 * shape[0] * shape[1])
                self._vectors = np.memmap(file, np.float16, "r+", shape=shape)
            self._done = np.zeros(len(self._texts), bool)
        rows = rows[~self._done[rows]]
        # Equal lengths together need little padding; with the longest first, memory that does not
        # suffice is seen at once.
        rows = rows[np.argsort(-self._texts.sizes()[rows], kind="stable")]
        console = output(stderr=True)
        by = f"{self._model.name} ({self._model.pooling} pooling, on {self._model.device})"
        said = f"{by}: {len(rows)} rows to embed, {pairs} pairs to compare"
        console.print(Text(printable(said)))
        starts = range(0, len(rows), _BATCH)
        hidden = not console.is_terminal
        for start in track(starts, "embedding", console=console, transient=True, disable=hidden):
            batch = rows[start : start + _BATCH]
            texts = (self._texts[row].decode("utf-8", "replace") for row in batch.tolist())
            self._vectors[batch] = self._model.encode([*texts])
        self._done[rows] = True

    def __getitem__(self, rows: _Rows) -> torch.Tensor:
        """Return the vectors of embedded rows, as float32 where the model computes."""
        import torch

        vectors = cast("NDArray[np.float16]", self._vectors)[rows]
        return torch.from_numpy(np.asarray(vectors)).to(self._model.device).float()


def match_embeddings(
    matches: Matches,
    rows: _Rows,
    references: int | None,
    embeddings: Embeddings,
    threshold: float,
) -> None:
    """Match each of some rows with the most similar one before it that has no match.

    Rows are similar whose cosine similarity is at least `threshold`; all pairs are compared. With
    `references`, rows are compared with the first `references` ones of `rows` alone, and these with
    none. Raises ConfigError where there are too many pairs.
    """
    from rich.progress import track

    kept, own = rows[: references or 0], rows[references or 0 :]
    pairs = len(own) * (len(own) - 1) // 2 if references is None else len(own) * len(kept)
    if pairs > _MOST_ROWS**2 // 2:
        raise ConfigError(
            f"{OPTION}: {len(rows)} rows are {pairs} pairs to compare, more than those of "
            f"{_MOST_ROWS} rows, which would take too long; leave out similar rows first, without "
            f"{OPTION}, or divide the file and give the parts one by one, which are not compared "
            "with each other then"
        )
    embeddings.embed(rows, pairs)
    console = output(stderr=True)
    hidden, starts = not console.is_terminal, range(0, len(own), _BLOCK)
    for start in track(starts, "comparing", console=console, transient=True, disable=hidden):
        block = own[start : start + _BLOCK]
        vectors = embeddings[block]
        best, other = _nearest(vectors, kept, embeddings)
        if references is None:
            _match_within(vectors, block, best, other, threshold)
            kept = np.concatenate((kept, block[best < threshold]))
        found = best >= threshold
        matches.other[block[found]] = other[found]
        matches.similarity[block[found]] = np.minimum(best[found], 1)


def _nearest(
    vectors: torch.Tensor, kept: _Rows, embeddings: Embeddings
) -> tuple[NDArray[np.float32], _Rows]:
    """Return for each vector the greatest similarity to a kept row, or -1, and that row."""
    best = np.full(len(vectors), -1, np.float32)
    other = np.full(len(vectors), -1)
    for start in range(0, len(kept), _OTHERS):
        others = kept[start : start + _OTHERS]
        greatest, places = (vectors @ embeddings[others].T).max(dim=1)
        similarity = greatest.cpu().numpy()
        better = similarity > best
        best[better] = similarity[better]
        other[better] = others[places.cpu().numpy()[better]]
    return best, other


def _match_within(
    vectors: torch.Tensor,
    block: _Rows,
    best: NDArray[np.float32],
    other: _Rows,
    threshold: float,
) -> None:
    """Look for more similar rows within a block too, among those before each that are kept."""
    near = (vectors @ vectors.T).tril(-1).cpu().numpy()
    for place in np.flatnonzero((near >= threshold).any(axis=1)):
        earlier = np.where(best[:place] < threshold, near[place, :place], -1)
        first = int(earlier.argmax())
        if earlier[first] > best[place]:
            best[place], other[place] = earlier[first], block[first]
