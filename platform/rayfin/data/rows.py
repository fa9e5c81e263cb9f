"""One row of a file, and opening files of rows."""

from __future__ import annotations

import codecs
import gzip
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from rayfin.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

LONGEST_LINE = 64 * 2**20
"""The most bytes of a JSON line; a longer one is a bad row, as it is not held in memory."""

_READ_SIZE = 2**20
# Gzip makes at most about 1000 bytes of one; of text in a natural language it makes 3 to 10.
_LEAST_UNPACKED, _MOST_TIMES = 64 * 2**20, 100


@dataclass(frozen=True)
class Row:
    """One row of a file: its value, or the problem that kept it from being read."""

    file: str
    line: int
    value: Any = None
    problem: str | None = None
    rows: int = 1
    """More than one where a problem, such as an open quote, made several rows one."""
    row_like_lines: int = 0
    """The number of lines within quoted cells that look like rows of their own."""


@dataclass(frozen=True)
class BadRow:
    """A row that can't be used, and why.

    Lines are counted from 1; in Parquet files and JSON arrays, rows are counted instead.
    """

    file: str
    line: int
    reason: str
    rows: int = 1
    """The number of rows lost with it: an open quote swallows the rows after it."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


def open_source(path: Path) -> IO[bytes]:
    """Open a file for reading; a .gz is decompressed, and UTF-16 and UTF-32 become UTF-8.

    Raises UnicodeDecodeError where a file has the byte order mark of UTF-16 or UTF-32 but is not in
    that encoding. Reading raises DataError where a small .gz unpacks to so much that it must be
    meant to fill the memory.
    """
    packed = path.suffix.lower() == ".gz"
    source = cast("IO[bytes]", io.BufferedReader(_Unpacked(path)) if packed else path.open("rb"))
    encoding = marked_encoding(source.read(4))
    source.seek(0)
    if encoding is None:
        return source
    with source:
        return io.BytesIO(source.read().decode(encoding).encode())


class _Unpacked(io.RawIOBase):
    """The content of a .gz file, up to a multiple of the file's own size."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, gzip.GzipFile(path)
        self._most = max(_LEAST_UNPACKED, _MOST_TIMES * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        count = self._file.readinto(buffer)
        if self._file.tell() > self._most:
            raise DataError(
                f"data.path: '{self._path}' unpacks to more than {_MOST_TIMES} times its size "
                f"({self._most:,} bytes are allowed); if that is right, unpack it with gunzip and "
                "give the unpacked file"
            )
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def lines_of(source: IO[bytes], stop: int | None = None) -> Iterator[bytes]:
    """Yield the lines from the current position on; with `stop`, those that begin before that byte.

    Of a line of more than LONGEST_LINE bytes, only the first LONGEST_LINE + 1 are yielded.
    """
    while (stop is None or source.tell() < stop) and (line := source.readline(LONGEST_LINE + 1)):
        yield line
        if is_cut(line):
            skip_line(source)


def skip_line(source: IO[bytes], stop: int | None = None) -> None:
    """Read to the end of the line, or to byte `stop`, without holding the line."""
    while (size := _READ_SIZE if stop is None else min(_READ_SIZE, stop - source.tell())) > 0:
        piece = source.readline(size)
        if not piece or piece.endswith(b"\n"):
            return


def is_cut(line: bytes) -> bool:
    """Whether a line from `lines_of` is only the start of one that is too long to be held."""
    return len(line) > LONGEST_LINE


def marked_encoding(start: bytes) -> str | None:
    """Return the encoding other than UTF-8 that a byte order mark at a file's start announces."""
    # The mark of UTF-32 begins with that of UTF-16.
    for mark, encoding in _MARKS:
        if start.startswith(mark):
            return encoding
    return None


def not_utf8(raw: bytes, byte: int) -> str:
    """Return why bytes are no UTF-8 text, with the command that most likely converts them."""
    high = re.findall(rb"[\x80-\xff]+", raw)
    # Chinese characters have two bytes, and stand together; of Western text most high bytes are
    # alone.
    together = sum(len(run) for run in high if len(run) > 1) > len(b"".join(high)) / 2
    encoding = "gb18030" if together and _decodes(raw, "gb18030") else "windows-1252"
    return f"not UTF-8 (byte {byte:#04x}); perhaps iconv -f {encoding} -t utf-8 makes it so"


def _decodes(raw: bytes, encoding: str) -> bool:
    try:
        raw.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
