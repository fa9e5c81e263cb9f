"""Texts of many rows on disk rather than in memory."""

from __future__ import annotations

import os
import tempfile
from array import array
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class Spill:
    """A list of byte strings in a temporary file that has no name, so that no kill leaves it."""

    def __init__(self, directory: Path) -> None:
        """Open a file in `directory`, whose file system needs room for all that is added."""
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
        self._ends = array("q", [0])
        self._flushed = 0

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, content: bytes) -> None:
        """Add a byte string."""
        self._file.write(content)
        self._ends.append(self._ends[-1] + len(content))

    def __getitem__(self, number: int) -> bytes:
        if self._flushed < len(self):
            self._file.flush()
            self._flushed = len(self)
        start, end = self._ends[number], self._ends[number + 1]
        return os.pread(self._file.fileno(), end - start, start)

    def sizes(self) -> NDArray[np.int64]:
        """Return the number of bytes of each byte string."""
        ends = np.array(self._ends, np.int64)
        return ends[1:] - ends[:-1]

    def close(self) -> None:
        """Remove the file."""
        self._file.close()
