"""One row of a file, and opening files of rows."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from rayfin.data.encodings import (
    find_encoding,
    is_mostly_utf8,
    marked_encoding,
    possible_encodings,
    wide_encoding,
)
from rayfin.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

LONGEST_LINE = 64 * 2**20
"""The most bytes of a JSON line; a longer one is a bad row, as it is not held in memory."""

_READ_SIZE, _SAMPLE = 2**20, 2**23
# Gzip makes at most about 1000 bytes of one; of text in a natural language it makes 3 to 10.
_LEAST_UNPACKED, _MOST_TIMES = 64 * 2**20, 100


class TableRow(dict[str, Any]):
    """A row of a table whose cells are texts: a list in one can only be given as its JSON text."""


class Row(NamedTuple):
    """One row of a file: its value, or the problem that kept it from being read."""

    file: str
    line: int
    value: Any = None
    problem: str | None = None
    rows: int = 1
    """More than one where a problem, such as an open quote, made several rows one."""
    row_like_lines: int = 0
    """The number of lines within quoted cells that look like rows of their own."""
    read_as: str = ""
    """What its file was read as where that was guessed, given with the first row alone."""
    raw: bytes = b""
    """What stands in the file in the place of a row that can't be read, where that is known."""


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


PACKED = (".gz", ".zst", ".bz2", ".xz")
"""The suffixes of compressed files that are read."""


def open_source(path: Path, encoding: str | None = None) -> tuple[IO[bytes], str]:
    """Open a text file for reading as UTF-8; a compressed one is decompressed.

    `encoding` is that of a file without a byte order mark; None is what its bytes say. Returns the
    encoding too where it is another one that the file tells, else an empty text. Raises DataError
    where a file is not in the `encoding`, and UnicodeDecodeError where it has the byte order mark
    of UTF-16 or UTF-32 but is not in that encoding. Reading raises DataError where a small
    compressed file unpacks to so much that it must be meant to fill the memory.
    """
    source = _opened(path)
    start = source.read(4)
    source.seek(0)
    found = marked_encoding(start)
    if found is None and not start.startswith(codecs.BOM_UTF8) and encoding != "utf-8":
        found = encoding or _told_encoding(source)
        source.seek(0)
    if found is None:
        return source, ""
    with source:
        raw = source.read()
    try:
        text = raw.decode(found)
    except UnicodeDecodeError as error:
        if marked_encoding(start):
            raise
        if encoding is None:  # some rows are broken
            return io.BytesIO(raw), ""
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"data.encoding: '{path}' is not {encoding} (byte {raw[error.start]:#04x} in line "
            f"{line}); mend that line, or give the file's encoding"
        ) from None
    if found == encoding:
        check_not_utf8(path, raw, encoding)
    shown = "" if found == encoding else found
    return io.BytesIO(text.removeprefix("\ufeff").encode()), shown


def _opened(path: Path) -> IO[bytes]:
    packed = path.suffix.lower() in PACKED
    return cast("IO[bytes]", io.BufferedReader(_Unpacked(path)) if packed else path.open("rb"))


def is_utf8_text(path: Path) -> bool:
    """Whether a text file, compressed or not, is plainly UTF-8, and not only ASCII."""
    with _opened(path) as source:
        return is_mostly_utf8(source.read(_SAMPLE))


def check_not_utf8(path: Path, start: bytes, encoding: str) -> None:
    """Raise DataError where a file's start is plainly UTF-8 although another encoding is given."""
    if is_mostly_utf8(start[:_SAMPLE]):
        raise DataError(
            f"data.encoding: '{path}' is UTF-8 rather than {encoding}; give the files of each "
            "encoding on their own, or convert one with iconv"
        )


def _told_encoding(source: IO[bytes]) -> str | None:
    """Return the encoding other than UTF-8 that the bytes of a source tell with certainty."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    piece = source.read(_READ_SIZE)
    if b"\0" in piece:
        return wide_encoding(piece)
    while piece:
        try:
            if not decoder.decode(piece).isascii():
                return None  # so much of it is UTF-8 by no accident
        except UnicodeDecodeError:
            found = find_encoding(piece + source.read(_SAMPLE))
            return found.name if found is not None and found.certain else None
        piece = source.read(_READ_SIZE)
    return None


def most_unpacked(path: Path) -> int:
    """Return how many bytes a compressed file may unpack to: more is meant to fill the memory."""
    return max(_LEAST_UNPACKED, _MOST_TIMES * path.stat().st_size)


class _Unpacked(io.RawIOBase):
    """The content of a compressed file, up to a multiple of the file's own size."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._most = most_unpacked(path)
        self._open()

    def _open(self) -> None:
        self._at, self._file = 0, _decompressing(self._path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence == io.SEEK_SET and offset == 0:
            if self._at:
                self._file.close()
                self._open()
        elif whence != io.SEEK_CUR or offset:
            raise io.UnsupportedOperation("only the start of a compressed file can be sought")
        return self._at

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        piece = self._file.read(len(memoryview(buffer)))
        memoryview(buffer)[: len(piece)] = piece
        self._at += len(piece)
        if self._at > self._most:
            raise DataError(
                f"data.path: '{self._path}' unpacks to more than {_MOST_TIMES} times its size "
                f"({self._most:,} bytes are allowed); if that is right, unpack it (with gunzip, "
                "say) and give the unpacked file"
            )
        return len(piece)

    def close(self) -> None:
        self._file.close()
        super().close()


def _decompressing(path: Path) -> IO[bytes]:
    match path.suffix.lower():
        case ".gz":
            return cast("IO[bytes]", gzip.GzipFile(path))
        case ".bz2":
            return cast("IO[bytes]", bz2.BZ2File(path))
        case ".xz":
            return cast("IO[bytes]", lzma.LZMAFile(path))
    import pyarrow as pa

    return cast("IO[bytes]", pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))


def lines_of(source: IO[bytes], stop: int | None = None) -> Iterator[bytes]:
    """Yield the lines from the current position on; with `stop`, those that begin before that byte.

    Of a line of more than LONGEST_LINE bytes, only the first LONGEST_LINE + 1 are yielded.
    """
    most = LONGEST_LINE + 1
    while (size := _READ_SIZE if stop is None else min(_READ_SIZE, stop - source.tell())) > 0:
        if not (block := source.read(size)):
            return
        *whole, rest = block.split(b"\n")  # in half the time of as many calls of readline
        for line in whole:
            yield line + b"\n"
        if rest:
            yield (line := rest + source.readline(most - len(rest)))
            if len(line) == most:
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


def not_utf8(raw: bytes, byte: int) -> str:
    """Return why a row's bytes are no UTF-8 text, with the setting that most likely reads them."""
    if found := find_encoding(raw):
        remedy = f"if the file is {found.name}, set data.encoding={found.name}"
    else:
        names = possible_encodings(raw) if not is_mostly_utf8(raw) else []
        possible = f" ({' or '.join(names)}, perhaps)" if names else ""
        remedy = f"mend the row, or give the file's encoding as data.encoding{possible}"
    return f"not UTF-8 (byte {byte:#04x}); {remedy}"
