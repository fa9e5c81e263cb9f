"""Read the rows of CSV and TSV files: find the delimiter and the quotes, and report open ones."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from typing import IO

from rayfin.data.columns import NOT_NEEDED, USED
from rayfin.data.row_settings import RowSettings
from rayfin.data.rows import Row, TableRow, not_utf8

_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\r?', re.IGNORECASE)
_LARGEST_CELL = 2**27
_NO_VALUE = ("null", "NaN")
"""The texts that databases and pandas write into a cell without a value."""


def read_csv(file: str, source: IO[bytes], settings: RowSettings) -> Iterator[Row]:
    """Return the rows of a CSV file, delimited by commas, semicolons, tabs or bars."""
    text = _read_text(source)
    first, _, rest = text.partition("\n")
    if separator := _SEPARATOR_LINE.fullmatch(first):  # what Excel is told the delimiter by
        return _rows(file, rest, separator[1], settings, before=1)
    delimiter = _delimiter_of(first)
    if delimiter == "\t":  # what spreadsheets write as "Unicode text"
        return iter(_tab_separated(file, text, settings))
    return _rows(file, text, delimiter, settings)


def read_tsv(file: str, source: IO[bytes], settings: RowSettings) -> Iterator[Row]:
    """Return the rows of a TSV file."""
    return iter(_tab_separated(file, _read_text(source), settings))


def _read_text(source: IO[bytes]) -> str:
    csv.field_size_limit(max(csv.field_size_limit(), _LARGEST_CELL))
    # surrogateescape: a byte that is not UTF-8 spoils its own row, not the rest of the file.
    return source.read().decode("utf-8-sig", errors="surrogateescape")


def _delimiter_of(header: str) -> str:
    """Return the delimiter that divides a header into the most names that formats have.

    Where that decides nothing, it is the first that the header has of a comma, a tab, a semicolon
    (what spreadsheets write in much of Europe) and a bar.
    """
    there = [each for each in ",\t;|" if each in header]

    def known(delimiter: str) -> int:
        cells = (cell.strip(' "\r').casefold() for cell in header.split(delimiter))
        return sum(cell in USED for cell in cells)

    return max(there, key=known, default=",")


def _tab_separated(file: str, text: str, settings: RowSettings) -> list[Row]:
    """Read quotes as characters, unless the file shows that they enclose its cells."""
    plain = list(_rows(file, text, "\t", settings, quotes=False))
    if '"' not in text:
        return plain
    quoted = list(_rows(file, text, "\t", settings))
    lost = [sum(row.rows for row in rows if row.problem) for rows in (plain, quoted)]
    if lost[0] != lost[1]:
        return plain if lost[0] < lost[1] else quoted
    return quoted if _shows_quotes(plain) else plain


def _shows_quotes(plain: list[Row]) -> bool:
    """Whether all cells of a column are quoted, or a quoted cell doubles the quotes within it."""
    cells = [row.value for row in plain if row.problem is None]
    columns = [[row[name] for row in cells if row[name]] for name in (cells[0] if cells else ())]
    enclosed = [[len(c) > 1 and c[0] == c[-1] == '"' for c in column] for column in columns]
    return any(column and all(column) for column in enclosed) or any(
        yes and '""' in cell[1:-1] and '"' not in cell[1:-1].replace('""', "")
        for column, marks in zip(columns, enclosed, strict=True)
        for cell, yes in zip(column, marks, strict=True)
    )


def _rows(
    file: str,
    text: str,
    delimiter: str,
    settings: RowSettings,
    *,
    quotes: bool = True,
    before: int = 0,
) -> Iterator[Row]:
    """Yield the rows of a table whose first line is its header; `before` lines come before it."""
    lines = io.StringIO(text, newline="").readlines()
    reader = csv.reader(
        lines,
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
        strict=True,
    )
    header: list[str] | None = None
    may_lack: list[bool] = []
    while True:
        begin = reader.line_num
        line = begin + 1 + before
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield _broken(file, line, lines[begin : reader.line_num], delimiter, str(error))
            if header is None:
                return
            continue
        if not any(cells):
            continue
        problem = _problem_of_cells(cells, header)
        if problem is not None:
            raw = _encoded(lines[begin : reader.line_num])
            yield Row(file, line, problem=problem, raw=raw)
            if header is None:  # without a header no row after it means anything
                return
        elif header is None:
            header = [cell.strip() or f"column {n}" for n, cell in enumerate(cells, 1)]
            may_lack = [(settings.column_of(n) or n).casefold() in NOT_NEEDED for n in header]
        else:
            value = TableRow(
                (name, None if lacks and cell in _NO_VALUE else cell)
                for name, cell, lacks in zip(header, cells, may_lack, strict=True)
            )
            yield Row(file, line, value, row_like_lines=_row_like_lines(cells, header, delimiter))


def _row_like_lines(cells: list[str], header: list[str], delimiter: str) -> int:
    """Count the lines within cells, after each cell's first, that look like rows of their own.

    Such a line has the header's number of cells, at least two of them filled, and none that
    begins with a space, as prose does after a comma.
    """
    lines = [line for cell in cells for line in cell.splitlines()[1:]]
    found = (line.split(delimiter) for line in lines)
    return sum(
        len(parts) == len(header)
        and sum(map(bool, map(str.strip, parts))) > 1
        and not any(part.startswith(" ") for part in parts)
        for parts in found
    )


def _broken(file: str, line: int, lost: list[str], delimiter: str, reason: str) -> Row:
    """Return the bad row for the lines that an open or stray quote joins into one."""
    rows = sum(1 for each in lost if each.strip())
    if "end of data" in reason:
        loose = list(csv.reader(lost, delimiter=delimiter))
        opened = line + len(lost) - 1 - loose[-1][-1].rstrip("\n").count("\n")
        reason = f"the quote opened on line {opened} is never closed"
    if rows > 1:
        reason += f", and takes the {rows} lines from here on along"
    problem = f"broken CSV: {reason}; double each quote within a cell"
    return Row(file, line, problem=problem, rows=rows, raw=_encoded(lost))


def _encoded(lines: list[str]) -> bytes:
    """Return the bytes that lines were read from."""
    return "".join(lines).encode(errors="surrogateescape")


def _problem_of_cells(cells: list[str], header: list[str] | None) -> str | None:
    joined = "".join(cells)
    if "\0" in joined:
        return "holds a NUL character"
    try:
        joined.encode()
    except UnicodeEncodeError as error:
        return not_utf8(joined.encode(errors="surrogateescape"), ord(joined[error.start]) - 0xDC00)
    if header is None:
        named = [cell.strip() for cell in cells if cell.strip()]
        twice = [name for name in named if named.count(name) > 1]
        return f"the header has '{twice[0]}' twice; rename one of them" if twice else None
    if len(cells) != len(header):
        remedy = "; put a cell that holds the delimiter in quotes" * (len(cells) > len(header))
        return f"has {len(cells)} cells where the header has {len(header)}{remedy}"
    return None
