"""Read a sheet of an Excel workbook (.xlsx) as a table with a header."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import ROUND_HALF_UP, Decimal
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from typing import Any

from rayfin.data.columns import NAMED
from rayfin.data.row_reader import ignore_setting
from rayfin.data.row_settings import RowSettings
from rayfin.data.rows import Row, TableRow, most_unpacked
from rayfin.errors import DataError, DependencyError, did_you_mean

_INSTEAD = 'save the sheet with the rows as "CSV UTF-8" and give that file'
_NUMBER_FORMAT = re.compile(r"General|@|0(\.(?P<places>0+))?(?P<percent>%)?", re.IGNORECASE)
_MERGED = re.compile(rb'<(?:\w+:)?mergeCell\s[^>]*?ref="([A-Z0-9:$]+)"')
_FORMULA = re.compile(rb"<(?:\w+:)?f[\s/>]")
_ESCAPED = re.compile(r"_x00([01][0-9A-Fa-f])_")
_PIECE, _OVERLAP = 2**20, 2**8


def read_workbook(path: Path, settings: RowSettings) -> Iterator[Row]:
    """Yield the rows of a workbook's sheet; the first row with a value is the header.

    It is the sheet `settings.sheet`, or else the first that is not hidden. Numbers, dates and
    truth values are read as text, with dates as YYYY-MM-DD; where a column that formats use has a
    number in another format than General, fixed decimals and per cent, the row is a bad one. Of
    formulas the values are read that were saved. Raises DataError where there is no such sheet, or
    the file is no workbook, and DependencyError where openpyxl is not installed.
    """
    if find_spec("openpyxl") is None:
        raise DependencyError(
            f"data.path: '{path}' is a workbook, which needs the package openpyxl; run: pip "
            f"install 'rayfin[excel]', or {_INSTEAD}"
        )
    try:
        with warnings.catch_warnings():  # of what a workbook has beside its cells
            warnings.simplefilter("ignore")
            rows = list(_read(path, settings))
    except (zipfile.BadZipFile, KeyError, ValueError, SyntaxError) as error:  # of ZIP and XML
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"data.path: '{path}' can't be read as a workbook ({reason:.100}); save it again as "
            f".xlsx and without a password, or {_INSTEAD}"
        ) from error
    yield from rows


def _read(path: Path, settings: RowSettings) -> Iterator[Row]:
    from openpyxl.reader.excel import ExcelReader

    with zipfile.ZipFile(path) as packed:
        if sum(member.file_size for member in packed.infolist()) > (most := most_unpacked(path)):
            raise DataError(
                f"data.path: '{path}' unpacks to more than {most:,} bytes, which no table of its "
                f"size does; {_INSTEAD}"
            )
    readers = [ExcelReader(path, read_only=True, data_only=values) for values in (True, False)]
    try:
        readers[0].read()
        members = {sheet.name: rel.target for sheet, rel in readers[0].parser.find_sheets()}
        sheets = readers[0].wb.worksheets
        names = [sheet.title for sheet in sheets]
        title = _chosen(path, sheets, settings.sheet)
        found = _scanned(readers[0].archive, members[title])
        formulas: Iterator[Sequence[Any]] = repeat(())
        if found.has_formulas:
            readers[1].read()
            formulas = _cells(readers[1].wb[title])
        others = [f"'{name}'" for name in names if name != title]
        read_as = (
            f"its sheet '{title}' (not read: {', '.join(others)}; data.path={path.name} and "
            "data.name=SHEET read another)"
        )
        rows = _rows(path, _cells(readers[0].wb[title]), formulas, found.merged, settings)
        first = next(rows, None)
        if first is not None:
            guessed = bool(others) and settings.sheet is None
            yield first._replace(read_as=read_as if guessed else "")
        yield from rows
    finally:
        for reader in readers:
            reader.archive.close()


def _chosen(path: Path, sheets: Sequence[Any], wanted: str | None) -> str:
    """Return the title of the sheet to read."""
    names = [str(sheet.title) for sheet in sheets]
    if wanted is not None:
        if wanted not in names:
            raise DataError(
                f"data.name: '{path}' has no sheet '{wanted}'{did_you_mean(wanted, names)}; it has "
                f"{', '.join(names)}"
            )
        return wanted
    shown = [name for name, it in zip(names, sheets, strict=True) if it.sheet_state == "visible"]
    if not names:
        raise DataError(f"data.path: '{path}' has no sheet with cells; {_INSTEAD}")
    return (shown or names)[0]


@dataclass(frozen=True)
class _Scanned:
    """What the text of a sheet has beside the cells that openpyxl reads one by one."""

    merged: tuple[tuple[int, int, int, int], ...]
    """(first row, last row, first column, last column) of each merged range, counted from 1."""
    has_formulas: bool


def _scanned(packed: zipfile.ZipFile, member: str) -> _Scanned:
    from openpyxl.utils import range_boundaries

    merged, has_formulas, kept = dict[bytes, None](), False, b""
    with packed.open(member) as text:
        while piece := text.read(_PIECE):
            around = kept + piece
            has_formulas = has_formulas or _FORMULA.search(around) is not None
            merged |= dict.fromkeys(_MERGED.findall(around))
            kept = around[-_OVERLAP:]
    bounds = (range_boundaries(each.decode()) for each in merged)
    return _Scanned(
        tuple((top, low, left, right) for left, top, right, low in bounds), has_formulas
    )


def _cells(sheet: Any) -> Iterator[Sequence[Any]]:
    """Return the rows of a sheet's cells, whatever size it says that it has."""
    sheet.reset_dimensions()
    return iter(sheet.iter_rows())


def _rows(
    path: Path,
    cells: Iterator[Sequence[Any]],
    formulas: Iterator[Sequence[Any]],
    merged: Sequence[tuple[int, int, int, int]],
    settings: RowSettings,
) -> Iterator[Row]:
    from openpyxl.utils import get_column_letter

    file, header, ignored = str(path), dict[int, str](), settings.ignore
    filled: dict[int, tuple[int, Any]] = {}
    """Column -> (last row, value) of the merged range of rows that reaches into it."""
    down = {(top, left): low for top, low, left, right in merged if left == right and low > top}
    across = [each for each in merged if each[2] < each[3]]
    for line, (row, asked) in enumerate(zip(cells, formulas, strict=False), 1):
        values: dict[int, Any] = {}
        for column, cell in enumerate(row, 1):
            name = header.get(column, "")
            if name in settings.ignore and not settings.whole:
                continue
            formula = asked[column - 1] if column <= len(asked) else None
            value = _value_or_problem(cell, formula, name, settings)
            if value is not None:
                values[column] = value
                if (line, column) in down:
                    filled[column] = (down[line, column], value)
        filled = {column: each for column, each in filled.items() if each[0] >= line}
        values = {column: value for column, (_, value) in filled.items()} | values
        used = [value for column, value in values.items() if header.get(column) not in ignored]
        if not used:
            continue
        unreadable = (value.problem for value in used if isinstance(value, _Unreadable))
        problem = _spread(line, across) or next(unreadable, None)
        if not header:
            header = {column: str(value).strip() for column, value in values.items()}
            problem = problem or _problem_of_header(header, line, merged)
            if problem is not None:  # without a header no row after it means anything
                yield Row(file, line, problem=problem)
                return
            continue
        nameless = next((column for column in values if column not in header), None)
        if nameless is not None and problem is None:
            problem = (
                f"column {get_column_letter(nameless)} has a value here and no name; give each "
                "column one in the first row that is filled, and take out a title above that"
            )
        if problem is not None:
            names = {column: header.get(column) or get_column_letter(column) for column in values}
            cells_as_text = {names[column]: str(value) for column, value in values.items()}
            raw = json.dumps(cells_as_text, ensure_ascii=False).encode()
            yield Row(file, line, problem=problem, raw=raw)
            continue
        yield Row(file, line, TableRow((name, values.get(n)) for n, name in header.items()))


@dataclass(frozen=True)
class _Unreadable:
    """A cell's value that has no plain text, and so none in JSON."""

    text: str
    problem: str

    def __str__(self) -> str:
        return self.text


def _value_or_problem(cell: Any, formula: Any, name: str, settings: RowSettings) -> Any:
    """Return the value of a cell in the column `name`, and None also where nothing needs it."""
    try:
        return _value(cell, formula)
    except ValueError as error:
        problem = f"cell {cell.coordinate} {error}"
        if (settings.column_of(name) or name).casefold() not in NAMED:
            if not settings.whole:
                return None
            if name:
                problem += f", or leave the column out with {ignore_setting([name])}"
        return _Unreadable(str(formula.value if cell.value is None else cell.value), problem)


def _spread(line: int, across: Sequence[tuple[int, int, int, int]]) -> str | None:
    """Return why a row that a merged range of several columns crosses can't be read."""
    from openpyxl.utils import get_column_letter

    for top, low, left, right in across:
        if top <= line <= low:
            name = f"{get_column_letter(left)}{top}:{get_column_letter(right)}{low}"
            return f"cells {name} are merged, so that not every column has a value; unmerge them"
    return None


def _problem_of_header(
    header: Mapping[int, str], line: int, merged: Sequence[tuple[int, int, int, int]]
) -> str | None:
    names = list(header.values())
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        return f"the header has '{twice}' twice; rename one of them"
    if any(top <= line < low for top, low, _, _ in merged):
        return (
            "the header is merged with rows below it; unmerge it, and name each column in one row"
        )
    return None


def _value(cell: Any, formula: Any) -> Any:
    """Return a cell's value as text, None where it is empty.

    Raises ValueError for an error, a formula whose value was not saved, and what has no plain text.
    """
    value, kind = cell.value, getattr(cell, "data_type", "n")
    if value is None:
        if kind != "str" and getattr(formula, "data_type", None) == "f":
            raise ValueError(
                "is a formula whose value was not saved; open the workbook in Excel and save it"
            )
        return None
    if kind == "e":
        raise ValueError(f"has the error {value}; mend it, or leave it empty")
    match value:
        case bool():
            return str(value).upper()
        case int() | float():
            return _number(value, str(cell.number_format))
        case datetime() if value.time() == time():
            return value.date().isoformat()
        case datetime():
            return value.isoformat(" ")
        case date() | time():
            return value.isoformat()
        case str():
            text = _ESCAPED.sub(lambda found: chr(int(found[1], 16)), value)
            return text.replace("\r\n", "\n") or None
    raise ValueError(f"is {value}, which has no plain text; write it as text")


def _number(value: int | float, shown: str) -> str:
    """Return the text of a number in one of Excel's plain formats; raises ValueError otherwise."""
    found = _NUMBER_FORMAT.fullmatch(shown)
    if found is None:
        raise ValueError(
            f"is the number {value:.15g} in the format '{shown:.30}', whose text isn't known; give "
            "the column the format General, 0.00 or 0 %, or write it as text"
        )
    if "0" not in shown:
        return f"{value:.15g}" if isinstance(value, float) else str(value)
    exact = Decimal(repr(value)) * (100 if found["percent"] else 1)
    places = Decimal(1).scaleb(-len(found["places"] or ""))
    return f"{exact.quantize(places, ROUND_HALF_UP):f}{found['percent'] or ''}"
