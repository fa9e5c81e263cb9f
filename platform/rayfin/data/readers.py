"""Read files as rows; a row that can't be read holds the reason, and reading goes on."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from json.scanner import make_scanner
from pathlib import Path
from typing import IO, Any

from rayfin.data.columnar import read_arrow, read_parquet
from rayfin.data.columns import NEEDED
from rayfin.data.delimited import read_csv, read_tsv
from rayfin.data.row_settings import NO_SETTINGS, RowSettings
from rayfin.data.rows import (
    LONGEST_LINE,
    PACKED,
    Row,
    is_cut,
    is_utf8_text,
    lines_of,
    not_utf8,
    open_source,
)
from rayfin.data.turns import is_conversation
from rayfin.data.workbook import read_workbook
from rayfin.errors import DataError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CONSTANTS = {"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}
_NEXT_VALUE = re.compile(r"[\s,]*(?=[^\s,])")


def read_file(path: Path, settings: RowSettings = NO_SETTINGS) -> Iterator[Row]:
    """Yield the rows of a file; raises DataError where the system can't read it.

    The columns that `settings` ignores are not read where that saves work.
    """
    ending = _ending(path)
    with read_errors(path):
        if ending in _TABLES:
            yield from _TABLES[ending](path, settings)
            return
        source, encoding = open_source(path, settings.encoding)
        with source:
            rows = _TEXTS[ending](str(path), source, settings)
            if encoding:
                yield from (row._replace(read_as=encoding.upper()) for row in islice(rows, 1))
            yield from rows


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Raise a DataError for what the system raises on a file that can't be read."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
        if isinstance(error, gzip.BadGzipFile) and "Not a gzipped file" in str(error):
            raise DataError(
                f"data.path: '{path}' is not packed, though its name ends in {path.suffix}; take "
                "that off the name"
            ) from error
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"data.path: '{path}' can't be read ({reason}); check that the file is whole "
            "and that you may read it"
        ) from error


def _read_jsonl(file: str, lines: IO[bytes], _: RowSettings) -> Iterator[Row]:
    first = next((n for n in lines_of(lines) if n.removeprefix(_BYTE_ORDER_MARK).strip()), b"")
    lines.seek(0)
    if is_cut(first):  # a list may be as long as the file
        by_line = not first[:8].removeprefix(_BYTE_ORDER_MARK).startswith(b"[")
    else:
        start = first.removeprefix(_BYTE_ORDER_MARK)
        by_line = isinstance(_parsed(file, 1, start).value, dict)
    del first
    if by_line:
        yield from parse_lines(file, lines_of(lines))
    else:  # a list, objects over several lines, or a broken first line
        yield from _whole(file, lines.read().removeprefix(_BYTE_ORDER_MARK))


def parse_lines(
    file: str, lines: Iterable[bytes], *, first: bool = True, encoding: str | None = None
) -> Iterator[Row]:
    """Yield the rows of JSON Lines, which may end in commas.

    `first` says that the lines are those at the start of the file; `encoding` is theirs where it is
    not UTF-8.
    """
    encoding = None if encoding == "utf-8" else encoding
    for number, line in enumerate(lines, 1):
        if is_cut(line):
            yield Row(file, number, problem=_too_long())
            continue
        if encoding is None:
            try:  # what almost all lines are
                value, end = _SCAN(text := line.decode(), 0)
                if text[end:] in ("\n", "\r\n", ""):
                    yield Row(file, number, value)
                    continue
            except (StopIteration, ValueError, RecursionError):
                pass
        raw = line.removeprefix(_BYTE_ORDER_MARK) if first and number == 1 else line
        if encoding is not None:
            try:
                raw = raw.decode(encoding).encode()
            except UnicodeDecodeError as error:
                problem = f"not {encoding} (byte {raw[error.start]:#04x}); see data.encoding"
                yield Row(file, number, problem=problem, raw=raw)
                continue
        if raw.strip():
            yield _parsed(file, number, raw)


def _too_long() -> str:
    most = f"{LONGEST_LINE // 2**20} MiB"
    return (
        f"longer than {most}, the most that a line may have; put each object on a line of its own"
    )


def _parsed(file: str, line: int, raw: bytes) -> Row:
    try:
        return Row(file, line, _json(raw.decode().strip().removesuffix(",")))
    except UnicodeDecodeError as error:
        return Row(file, line, problem=not_utf8(raw, raw[error.start]), raw=raw)
    except json.JSONDecodeError as error:
        if b"\0" in raw:
            order = "le" if raw[1:2] == b"\0" else "be"  # without a mark; the first byte is ASCII
            problem = f"not UTF-8; if the file is utf-16-{order}, set data.encoding=utf-16-{order}"
        elif raw.strip() in (b"{", b"["):
            problem = "broken JSON: an object must be on one line; jq -c . puts it there"
        else:
            problem = _broken(error)
        return Row(file, line, problem=problem, raw=raw)
    except (ValueError, RecursionError) as error:
        return Row(file, line, problem=f"JSON that can't be read: {error}", raw=raw)


def _broken(error: json.JSONDecodeError) -> str:
    at, text = error.pos, error.doc
    if text[at : at + 1] in ("]", "}") and text[max(0, at - 100) : at].rstrip()[-1:] == ",":
        return f"broken JSON: there is nothing between a comma and {text[at]}; take the comma out"
    return f"broken JSON: {error.msg} at column {error.colno}"


# NaN is no JSON, but what pandas makes of a missing value; a number it can't be here.
_DECODER = json.JSONDecoder(parse_constant=_CONSTANTS.get)
# It does not look for white space at both ends.
_SCAN: Callable[[str, int], tuple[Any, int]] = make_scanner(_DECODER)  # type: ignore[arg-type]


def _json(text: str) -> object:
    return _DECODER.decode(text)


def _read_json(file: str, source: IO[bytes], _: RowSettings) -> Iterator[Row]:
    return _whole(file, source.read().removeprefix(_BYTE_ORDER_MARK))


def _whole(file: str, raw: bytes) -> Iterator[Row]:
    """Yield the rows of a list, an object with one list, consecutive objects, or JSON Lines."""
    if not raw.strip():
        return
    try:
        whole = _json(raw.decode())
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        around = raw.splitlines()[line - 1]
        yield Row(file, line, problem=not_utf8(around, raw[error.start]))
        return
    except json.JSONDecodeError as error:
        first = raw.lstrip().partition(b"\n")[0]
        if _parsed(file, 1, first).problem is not None and (rows := _one_by_one(file, raw)):
            yield from rows
        elif error.msg == "Extra data" or (b"\n" in raw.strip() and first[:1] != b"["):
            yield from parse_lines(file, io.BytesIO(raw))
        else:
            yield Row(file, error.lineno, problem=_broken(error))
        return
    except (ValueError, RecursionError) as error:
        yield Row(file, 1, problem=f"JSON that can't be read: {error}")
        return
    if isinstance(whole, dict):
        if problem := _problem_of_object(whole):
            yield Row(file, 1, problem=problem)
            return
        whole = _listed(whole)
    if not isinstance(whole, list):
        yield Row(file, 1, problem="must be a list of objects, or an object that has one list")
        return
    for number, value in enumerate(whole, 1):
        yield Row(file, number, value)


def _problem_of_object(whole: dict[str, Any]) -> str:
    """Return why an object is neither one row nor holds one list of them, or an empty text."""
    values = list(whole.values())
    objects = bool(values) and all(isinstance(value, dict) and value for value in values)
    by_number = objects and all(str(key).isdecimal() for value in values for key in value)
    if by_number or {"columns", "index", "data"} == whole.keys():
        remedy = "write rows, with df.to_json(FILE, orient='records', lines=True)"
        return f"an object of columns, as pandas writes it; {remedy}"
    if len(values) < 2 or NEEDED & whole.keys():
        return ""
    if objects and len({tuple(value) for value in values}) == 1:
        return "an object of rows by their names; write a list, with jq -c '.[]'"
    if all(_is_list_of_rows(value) for value in values):
        names = list(whole)
        return (
            f"an object of several lists ({', '.join(names[:4])}); write each to a file of its "
            f"own, with jq -c '.{names[0]}[]': a directory of files is read by their names"
        )
    return ""


def _is_list_of_rows(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, dict) for each in value)
        and not is_conversation(value)
    )


def _listed(whole: dict[str, Any]) -> list[Any]:
    """Return the rows of an object's only list, each with the values beside the list.

    An object that is a row itself is returned as the only row.
    """
    lists = [name for name, value in whole.items() if isinstance(value, list)]
    if len(lists) != 1 or NEEDED & whole.keys():
        return [whole]
    beside = {name: value for name, value in whole.items() if name != lists[0]}
    return [{**beside, **row} if isinstance(row, dict) else row for row in whole[lists[0]]]


def _one_by_one(file: str, raw: bytes) -> list[Row]:
    """Return objects that span several lines, with or without commas; empty if there are none."""
    text, at, rows = raw.decode(), 0, list[Row]()
    line, counted = 1, 0
    while start := _NEXT_VALUE.match(text, at):
        line += text.count("\n", counted, counted := start.end())
        try:
            value, at = _DECODER.raw_decode(text, start.end())
        except (ValueError, RecursionError):
            return []
        rows.append(Row(file, line, value))
    return rows


_TEXTS: dict[str, Callable[[str, IO[bytes], RowSettings], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
}
_TABLES: dict[str, Callable[[Path, RowSettings], Iterator[Row]]] = {
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".xlsx": read_workbook,
}


def _ending(path: Path) -> str:
    """Return the suffix that tells the format of a file, without that of its compression."""
    ending = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    return inner if ending in PACKED and inner in _TEXTS else ending


def is_readable(path: Path) -> bool:
    """Whether the name of a file is that of a supported format."""
    return _ending(path) in _TEXTS.keys() | _TABLES.keys()


def is_plainly_utf8(path: Path) -> bool:
    """Whether a file is a text that is plainly UTF-8, and not only ASCII."""
    with read_errors(path):
        return _ending(path) in _TEXTS and is_utf8_text(path)


def allowed_names() -> str:
    """Return the suffixes of the supported files, separated by commas."""
    return f"{', '.join([*_TEXTS, *_TABLES])} (texts also with {', '.join(PACKED)} after it)"
