"""Read the rows of one data set with the samples that they are, and write rows and reports."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date, time
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rayfin.config import Config, DataConfig
from rayfin.data.columns import TEXTS_OR_TURNS, parsed_list
from rayfin.data.conversion import (
    RowStatistics,
    bad_rows_error,
    detect_shape,
    empty_split_error,
    no_valid_row_error,
)
from rayfin.data.row_reader import RowReader, ignore_setting
from rayfin.data.row_settings import RowSettings
from rayfin.data.rows import BadRow, Row, TableRow
from rayfin.data.shapes import fitting_shape
from rayfin.data.sources import find_splits, read_rows
from rayfin.data.splits import SplitSelection
from rayfin.data.turns import is_conversation
from rayfin.errors import ConfigError, DataError
from rayfin.samples import Example

MADE_BY = "made_by"
"""The key of a report, by which `rayfin.data.folders` knows that it holds no rows."""


READING_SETTINGS = (
    "split",
    "name",
    "format",
    "columns",
    "encoding",
    "on_bad_row",
    "ignore_columns",
)
"""The settings of data by which rows are read, besides the path."""

_ROWS_TO_DETECT_SHAPE = 1000
_DEEPEST = 200


class RowStream:
    """The rows of `data.path`, read one after the other; only the first thousand are ever held.

    Each iteration reads them from the start. After one that came to its end, `check` raises what
    makes the data unusable, and `notes` says what was guessed.
    """

    def __init__(self, config: Config, selection: SplitSelection | None = None) -> None:
        """Find the rows and their format.

        `selection` is what to read where that is not the whole of data.path. Without it, raises
        ConfigError for data.sources and data.eval_path, and DataError where the data has splits of
        its own. Raises DataError where there is no row, or none of a format that is read.
        """
        data = config.data
        self._config = config
        self._selection = selection or _only_split(data)
        self.settings = replace(RowSettings.of(data), whole=True)
        first = self._first_rows()
        if not first:
            raise empty_split_error(data, self._selection.train, "")
        self.shape = detect_shape(first, data)
        """The format of the rows, as `data.format` names it."""
        self._reader = RowReader(self.settings)
        self._begin()

    def _begin(self) -> None:
        self._statistics = RowStatistics(self.settings)
        self._first_bad: BadRow | None = None
        self.bad = 0
        """The number of rows of this iteration that can't be used."""

    def _first_rows(self) -> list[Row]:
        """Return the first rows; where none fits a format, also the first further on that does."""
        rows = read_rows(self._selection.train, self.settings)
        first = list(islice(rows, _ROWS_TO_DETECT_SHAPE))
        return (
            first if any(map(self._fits, first)) else [*first, *islice(filter(self._fits, rows), 1)]
        )

    def _fits(self, row: Row) -> bool:
        """Whether a row tells the format of all."""
        if row.problem is not None:
            return False
        if self._config.data.format == "auto":
            return fitting_shape(row.value, self.settings) is not None
        named = (name for _, name in self.settings.columns)
        return isinstance(row.value, Mapping) and all(name in row.value for name in named)

    @property
    def count(self) -> int:
        """The number of rows read, with those that an open quote makes part of another."""
        return self._statistics.rows

    def rows(self) -> Iterator[Row]:
        """Yield all rows in their order, from the start; `convert` says what each is."""
        self._begin()
        for row in read_rows(self._selection.train, self.settings):
            is_table = isinstance(row.value, TableRow)
            yield row._replace(value=self._with_lists(row.value)) if is_table else row

    def _with_lists(self, value: TableRow) -> TableRow:
        """Return a table's row with lists for the JSON text of turns, as JSON Lines hold them."""
        found = TableRow(value)
        for name, column in self._reader.used_names(value, self.shape):
            said = parsed_list(value[name]) if column in TEXTS_OR_TURNS else []
            if is_conversation(said):
                found[name] = said
                self._statistics.spelled_turns[name, True] += 1
        return found

    def convert(self, row: Row) -> Example | str:
        """Return the sample that a row is, or the reason why it can't be used, and count it."""
        example = self._statistics.convert(row, self.shape)
        if isinstance(example, str):
            self.bad += row.rows
            self._first_bad = self._first_bad or BadRow(row.file, row.line, example, row.rows)
        return example

    def __iter__(self) -> Iterator[tuple[Row, Example | str]]:
        """Yield each row with the sample that it is, or the reason why it can't be used."""
        for row in self.rows():
            yield row, self.convert(row)

    def check(self, *, may_skip: bool = False) -> None:
        """Raise DataError where no row could be used, and where settings name what no row has.

        A bad row is one too, unless data.on_bad_row=skip or `may_skip`.
        """
        data, first = self._config.data, self._first_bad
        if first is not None and data.on_bad_row == "error" and not may_skip:
            raise bad_rows_error(first, self.bad, self.count)
        if first is not None and not self._statistics.samples:
            raise no_valid_row_error(data, first)
        self._statistics.check_names()

    def notes(self, used: Collection[str] = ()) -> list[str]:
        """Return what was guessed, what is not trained on or not read, and settings without effect.

        `used` are the settings of data that have one besides those by which rows are read.
        """
        return [*self.reading_notes(), *unused_settings(self._config, [*READING_SETTINGS, *used])]

    def reading_notes(self) -> list[str]:
        """Return what was guessed, and what is not trained on or not read."""
        # The bad rows are listed one by one.
        return [*self._selection.unread_notes(), *self._statistics.notes(0, None)]


def _only_split(data: DataConfig) -> SplitSelection:
    """Return all of data.path, which must have no split for evaluation."""
    if data.sources or data.eval_path is not None:
        name = "sources" if data.sources else "eval_path"
        raise ConfigError(f"data.{name}: this command reads data.path alone; leave it out")
    selection = find_splits(data)
    if selection.eval is not None:
        raise DataError(
            f"data.path: '{data.path}' has splits of its own; data.split={selection.train.name} "
            "takes one of them, data.split=all joins them"
        )
    return selection


@dataclass
class ReadRows:
    """The rows of a data set, with what is to be said of them."""

    shape: str
    """Their format, as `data.format` names it."""
    rows: list[tuple[Row, Example]] = field(default_factory=list)
    """The rows that can be used, with the samples that they are."""
    left_out: list[dict[str, Any]] = field(default_factory=list)
    """The others: file, line and reason, and what stands there if it can be read."""
    count: int = 0
    """The number of rows read, with those that an open quote makes part of another."""
    notes: list[str] = field(default_factory=list)
    """What was guessed, what is not trained on or not read, and settings without effect."""


def read_whole(config: Config) -> ReadRows:
    """Read all rows of `data.path`, and hold them.

    Raises what `RowStream` and its `check` raise.
    """
    stream = RowStream(config)
    found = ReadRows(stream.shape)
    for row, example in stream:
        if isinstance(example, Example):
            found.rows.append((row, example))
        else:
            found.left_out.append(left_out(row, example))
    stream.check()
    found.count, found.notes = stream.count, stream.notes()
    return found


def unused_settings(config: Config, used: Collection[str]) -> list[str]:
    """Return a line on the settings that were written but for data.path and `used` ones, if any."""
    data = config.data.model_fields_set - {"path", *used}
    written = [f"data.{name}" for name in sorted(data)]
    written += sorted(config.model_fields_set - {"data"})
    return [f"no effect on what is written: {', '.join(written)}"] if written else []


def left_out(row: Row, reason: str) -> dict[str, Any]:
    """Return what a report says of a row that is not written."""
    there = {} if row.value is None or _is_deep(row.value) else {"row": row.value}
    several = {"rows": row.rows} if row.rows > 1 else {}
    return {"file": row.file, "line": row.line, "reason": reason, **several, **there}


def _is_deep(value: object) -> bool:
    """Whether lists and objects are nested more deeply than a report can hold them."""
    level = [value]
    for _ in range(_DEEPEST):
        nested = (each for each in level if isinstance(each, (Mapping, list, tuple)))
        lists = (each.values() if isinstance(each, Mapping) else each for each in nested)
        level = list(chain.from_iterable(lists))
        if not level:
            return False
    return True


def json_line(value: object) -> bytes:
    """Return a row as a line of JSON, with dates in ISO 8601 and null for NaN.

    Raises DataError, with the column's name, for what JSON has no form for, such as bytes.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        value = _as_json(value, "", _refused)
        text = json.dumps(value, ensure_ascii=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half of a character, which JSON can only escape
        return json.dumps(value).encode() + b"\n"


def as_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report as JSON can hold it, with `(bytes)`, say, in the place of bytes."""
    plain: dict[str, Any] = _as_json(report, "", _in_report)
    return plain


def _in_report(value: object, _: str) -> str:
    return f"({value if isinstance(value, float) else type(value).__name__})"


def _refused(value: object, column: str) -> Any:
    what = str(value) if isinstance(value, float) else f"a value of type {type(value).__name__}"
    raise DataError(
        f"data.path: the column '{column}' holds {what}, for which JSON has no "
        f"form; leave it out with {ignore_setting([column])}, or write the table with text in it"
    )


def _as_json(value: object, column: str, otherwise: Callable[[object, str], Any]) -> Any:
    """Return a value with what JSON can't hold replaced; `column` is the one that it stands in."""
    match value:
        case Mapping():
            return {str(k): _as_json(v, column or str(k), otherwise) for k, v in value.items()}
        case list() | tuple():
            return [_as_json(each, column, otherwise) for each in value]
        case date() | time():
            text = value.isoformat()
            return None if text == "NaT" else text
        case float() if math.isnan(value):
            return None
        case float() if math.isinf(value):
            return otherwise(value, column)
        case str() | int() | float() | None:
            return value
    return otherwise(value, column)


class RowWriter:
    """Writes rows as JSON Lines, without what JSON has no form for in columns that are ignored."""

    def __init__(self, ignored: Collection[str]) -> None:
        self._ignored = ignored
        self._dropped = set[str]()

    def line(self, value: object) -> bytes:
        """Return a row as a line; raises DataError for what has no form in another column."""
        if self._ignored and isinstance(value, Mapping):
            ignored = {name: each for name, each in value.items() if name in self._ignored}
            dropped = {name for name, each in ignored.items() if not _has_form(each)}
            self._dropped |= dropped
            value = {name: each for name, each in value.items() if name not in dropped}
        return json_line(value)

    def write(self, path: Path, values: Iterable[object]) -> int:
        """Write rows to a temporary file, and return their number."""
        count = 0
        with path.open("wb") as file:
            for value in values:
                file.write(self.line(value))
                count += 1
        return count

    def notes(self) -> list[str]:
        """Return a line on the columns of which something was not written, if any."""
        if not self._dropped:
            return []
        return [f"not written, as JSON has no form for it: {', '.join(sorted(self._dropped))}"]


def _has_form(value: object) -> bool:
    try:
        _as_json(value, "", _refused)
    except DataError:
        return False
    return True
