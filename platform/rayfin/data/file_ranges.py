"""Large files divided into ranges that any machine can read on its own, in any order."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path

from rayfin.data.columnar import count_row_groups, read_parquet
from rayfin.data.encodings import marked_encoding, wide_encoding
from rayfin.data.readers import parse_lines, read_errors, read_file
from rayfin.data.row_settings import NO_SETTINGS, RowSettings
from rayfin.data.rows import Row, check_not_utf8, lines_of, skip_line
from rayfin.data.splits import Split
from rayfin.data.stream import FileRange
from rayfin.errors import DataError

# Ranges are small, as each sample of an optimizer step comes from a range of its own, which is held
# in memory meanwhile; and there are many, so that a step's samples come from all over the data.
_MAX_BYTES, _MIN_BYTES, _RANGES = 2**20, 2**14, 4096
_SAMPLE = 2**20
_STREAMABLE = (".jsonl", ".ndjson", ".parquet")


def file_ranges(split: Split, *, source: int = 0, whole: bool = False) -> list[FileRange]:
    """Return the ranges that hold the rows of a split, in order.

    They depend on the names and sizes of the files only. A file that can't be read in parts is one
    range with `whole`, and else a DataError. `source` is the number that the ranges bear.
    """
    if split.tables:
        raise DataError(
            f"data.streaming=true: '{split.tables[0][0]}' is a hub data set; fetch its Parquet "
            "files and give their directory as data.path, or set data.streaming=false"
        )
    files = [file.absolute() for file in split.files]  # other processes read them, too
    problems = {file: problem for file in files if (problem := _unreadable_in_parts(file))}
    if problems and not whole:
        file, problem = next(iter(problems.items()))
        raise DataError(f"data.streaming=true: '{file}' {problem}, or set data.streaming=false")
    total = sum(f.stat().st_size for f in files if f.suffix.lower() != ".parquet")
    size = min(max(total // _RANGES, _MIN_BYTES), _MAX_BYTES)
    found: list[FileRange] = []
    for file in files:
        if file in problems:
            found.append(FileRange(str(file), 0, file.stat().st_size, source, whole=True))
        elif file.suffix.lower() == ".parquet":
            with read_errors(file):
                groups = count_row_groups(file)
            found += [FileRange(str(file), each, each + 1, source) for each in range(groups)]
        else:
            end = file.stat().st_size
            found += [
                FileRange(str(file), start, min(start + size, end), source)
                for start in range(0, end, size)
            ]
    return found


def _unreadable_in_parts(file: Path) -> str | None:
    """Return why a file can't be read in parts, and what would make it so."""
    if file.suffix.lower() not in _STREAMABLE:
        return (
            f"can't be read in parts; give {', '.join(_STREAMABLE)} (unpack .gz, and bring others "
            "into one of these)"
        )
    if file.suffix.lower() == ".parquet":
        return None
    with read_errors(file), file.open("rb") as opened:
        start = opened.read(2**16)
    encoding = marked_encoding(start) or (wide_encoding(start) if b"\0" in start else None)
    if encoding is None:
        return None
    return (
        f"is {encoding.upper()}, which can't be read in parts; convert it with "
        f"iconv -f {encoding} -t utf-8"
    )


def read_range(file_range: FileRange, settings: RowSettings = NO_SETTINGS) -> Iterator[Row]:
    """Yield the rows of a range; their lines are counted from 1 at its start.

    The columns that `settings` ignores are not read where that saves work. See
    `count_lines_before`.
    """
    path = Path(file_range.file)
    with read_errors(path):
        if file_range.whole:
            yield from read_file(path, settings)
        elif file_range.is_parquet:
            yield from read_parquet(path, settings, range(file_range.start, file_range.stop))
        else:
            yield from parse_lines(
                file_range.file,
                _lines(file_range),
                first=file_range.start == 0,
                encoding=_encoding(path, settings),
            )


def check_encoding(ranges: Sequence[FileRange], settings: RowSettings) -> None:
    """Raise DataError where a text file is plainly UTF-8 although another encoding is given."""
    files = dict.fromkeys(Path(e.file) for e in ranges if not (e.whole or e.is_parquet))
    for path in files:
        with read_errors(path):
            if encoding := _encoding(path, settings):
                with path.open("rb") as file:
                    check_not_utf8(path, file.read(_SAMPLE), encoding)


def _encoding(path: Path, settings: RowSettings) -> str | None:
    """Return the encoding of a text file that is read in parts, None where it is UTF-8."""
    if settings.encoding in (None, "utf-8"):
        return None
    with path.open("rb") as file:
        return None if file.read(3) == codecs.BOM_UTF8 else settings.encoding


def count_lines_before(ranges: Sequence[FileRange], file_range: FileRange) -> int:
    """Return how many lines (in Parquet, rows) of its file come before a range."""
    if file_range.is_parquet:
        earlier = [
            each
            for each in ranges
            if each.file == file_range.file and each.start < file_range.start
        ]
        return sum(sum(1 for _ in read_range(each)) for each in earlier)
    # A line that crosses into a range belongs to the range before it.
    return sum(1 for _ in _lines(FileRange(file_range.file, 0, file_range.start)))


def _lines(file_range: FileRange) -> Iterator[bytes]:
    with Path(file_range.file).open("rb") as file:
        if file_range.start:
            file.seek(file_range.start - 1)
            skip_line(file, file_range.stop)
        yield from lines_of(file, file_range.stop)
