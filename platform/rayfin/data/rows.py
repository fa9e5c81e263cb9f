"""One line of a source, and opening the source it came from."""

from __future__ import annotations

import codecs
import gzip
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class Row:
    """What one line of a source holds: a value, or the problem that kept it from being read."""

    file: str
    line: int
    value: Any = None
    problem: str | None = None
    rows: int = 1
    """More than one where a problem made several rows one: an open quote, say."""
    like_rows: int = 0
    """Lines within its quoted cells that look like rows of their own."""


def open_source(path: Path) -> IO[bytes]:
    """The bytes of a file, decompressed where its name ends in .gz; UTF-16 and UTF-32 become UTF-8.

    Raises UnicodeDecodeError where only the byte order mark is that of one of these.
    """
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    source = cast("IO[bytes]", opened(path, "rb"))
    encoding = marked_encoding(source.read(4))
    source.seek(0)
    if encoding is None:
        return source
    with source:
        return io.BytesIO(source.read().decode(encoding).encode())


def marked_encoding(start: bytes) -> str | None:
    """The encoding other than UTF-8 that a byte order mark at the start of a file announces."""
    # The mark of UTF-32 begins with that of UTF-16.
    for mark, encoding in _MARKS:
        if start.startswith(mark):
            return encoding
    return None


def not_utf8(raw: bytes, byte: int) -> str:
    """Why bytes are no text, with the command that most likely mends it."""
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
