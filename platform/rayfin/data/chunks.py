"""Large files in pieces that can be read each on its own, in any order, on any machine."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rayfin.data.readers import parse_lines, reading
from rayfin.data.rows import Row, lines_of, marked_encoding, skip_line
from rayfin.data.splits import Split
from rayfin.data.tables import read_parquet, row_groups
from rayfin.errors import DataError

# Small, as each of the samples of an optimizer step comes from another chunk, which is held in
# memory meanwhile; and many, so that a step's samples come from all over the data.
_MOST_BYTES, _LEAST_BYTES, _WANTED = 2**20, 2**14, 4096
_STREAMED = (".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True)
class FileRange:
    """The lines of a JSONL file that begin in bytes `start` to `stop`, or these row groups."""

    file: str
    start: int
    stop: int

    @property
    def is_parquet(self) -> bool:
        return self.file.lower().endswith(".parquet")


def chunks_of(split: Split) -> list[FileRange]:
    """Returns the rows of a split, in order, by the files' names and sizes alone.

    Raises DataError where they can't be read in parts.
    """
    if split.tables:
        raise DataError(
            f"data.streaming=true: '{split.tables[0][0]}' is a hub data set; fetch its Parquet "
            "files and give their directory as data.path, or set data.streaming=false"
        )
    files = [file.absolute() for file in split.files]  # other processes read them, too
    for file in files:
        if file.suffix.lower() not in _STREAMED:
            raise DataError(
                f"data.streaming=true: '{file}' can't be read in parts; give "
                f"{', '.join(_STREAMED)} (unpack .gz, and bring others into one of these), or set "
                "data.streaming=false"
            )
        with reading(file), file.open("rb") as start:
            encoding = marked_encoding(start.read(4))
        if encoding is not None and file.suffix.lower() != ".parquet":
            raise DataError(
                f"data.streaming=true: '{file}' is {encoding.upper()}, which can't be read in "
                f"parts; convert it with iconv -f {encoding} -t utf-8, or set data.streaming=false"
            )
    lines = sum(f.stat().st_size for f in files if f.suffix.lower() != ".parquet")
    size = min(max(lines // _WANTED, _LEAST_BYTES), _MOST_BYTES)
    found: list[FileRange] = []
    for file in files:
        if file.suffix.lower() == ".parquet":
            with reading(file):
                groups = row_groups(file)
            found += [FileRange(str(file), group, group + 1) for group in range(groups)]
        else:
            whole = file.stat().st_size
            found += [
                FileRange(str(file), start, min(start + size, whole))
                for start in range(0, whole, size)
            ]
    return found


def read_chunk(chunk: FileRange, ignore: Collection[str] = ()) -> Iterator[Row]:
    """The rows of a chunk; lines count from 1 at its beginning (see `line_before`).

    The columns in `ignore` are not read where that saves anything.
    """
    path = Path(chunk.file)
    with reading(path):
        if chunk.is_parquet:
            yield from read_parquet(path, ignore, range(chunk.start, chunk.stop))
        else:
            yield from parse_lines(chunk.file, _lines(chunk), first=chunk.start == 0)


def line_before(chunks: Sequence[FileRange], chunk: FileRange) -> int:
    """The lines (in Parquet the rows) of its file that come before `chunk`."""
    if chunk.is_parquet:
        earlier = [c for c in chunks if c.file == chunk.file and c.start < chunk.start]
        return sum(sum(1 for _ in read_chunk(c)) for c in earlier)
    # The line that a chunk begins within is the chunk's before it.
    return sum(1 for _ in _lines(FileRange(chunk.file, 0, chunk.start)))


def _lines(chunk: FileRange) -> Iterator[bytes]:
    with Path(chunk.file).open("rb") as file:
        if chunk.start:
            file.seek(chunk.start - 1)
            skip_line(file, chunk.stop)
        yield from lines_of(file, chunk.stop)
