"""One line of a source, and opening the source it came from."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast


@dataclass(frozen=True)
class Row:
    """What one line of a source holds: a value, or the problem that kept it from being read."""

    file: str
    line: int
    value: Any = None
    problem: str | None = None


def open_source(path: Path) -> IO[bytes]:
    """The bytes of a file, decompressed where its name ends in .gz."""
    if path.suffix.lower() == ".gz":
        return cast("IO[bytes]", gzip.open(path))
    return path.open("rb")
