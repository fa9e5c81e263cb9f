"""Read the rows of one data set with what they become, and write rows and reports whole."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date, time
from pathlib import Path
from typing import Any

from rayfin.config import Config
from rayfin.data.conversion import (
    RowStatistics,
    bad_rows_error,
    detect_shape,
    empty_split_error,
    no_valid_row_error,
)
from rayfin.data.row_settings import RowSettings
from rayfin.data.rows import BadRow, Row
from rayfin.data.sources import find_splits, read_rows
from rayfin.errors import ConfigError, DataError
from rayfin.samples import Example

MADE_BY = "made_by"
"""The key of a report, by which `rayfin.data.folders` knows that it holds no rows."""


_USED = ("split", "name", "format", "columns", "encoding", "on_bad_row", "ignore_columns")
"""The settings of data by which rows are read, besides the path."""


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
    """Read all rows of `data.path`.

    Raises DataError where it has splits of its own, where no row can be used, and for a bad row
    unless data.on_bad_row=skip.
    """
    data = config.data
    if data.sources or data.eval_path is not None:
        name = "sources" if data.sources else "eval_path"
        raise ConfigError(f"data.{name}: this command reads data.path alone; leave it out")
    selection = find_splits(data)
    if selection.eval is not None:
        raise DataError(
            f"data.path: '{data.path}' has splits of its own; data.split={selection.train.name} "
            "takes one of them, data.split=all joins them"
        )
    settings = replace(RowSettings.of(data), whole=True)
    rows = list(read_rows(selection.train, settings))
    if not rows:
        raise empty_split_error(data, selection.train, "")
    found = ReadRows(detect_shape(rows, data))
    statistics, bad = RowStatistics(settings), list[BadRow]()
    for row in rows:
        example = statistics.convert(row, found.shape)
        if isinstance(example, Example):
            found.rows.append((row, example))
        else:
            bad.append(BadRow(row.file, row.line, example, row.rows))
            found.left_out.append(left_out(row, example))
    if bad and data.on_bad_row == "error":
        raise bad_rows_error(bad[0], sum(each.rows for each in bad), statistics.rows)
    if not found.rows:
        raise no_valid_row_error(data, bad[0])
    statistics.check_names()
    found.count = statistics.rows
    found.notes = [
        *selection.unread_notes(),
        *statistics.notes(0, None),  # the bad rows are listed one by one
        *unused_settings(config, _USED),
    ]
    return found


def unused_settings(config: Config, used: Collection[str]) -> list[str]:
    """Return a line on the settings that were written but for data.path and `used` ones, if any."""
    data = config.data.model_fields_set - {"path", *used}
    written = [f"data.{name}" for name in sorted(data)]
    written += sorted(config.model_fields_set - {"data"})
    return [f"no effect on what is written: {', '.join(written)}"] if written else []


def left_out(row: Row, reason: str) -> dict[str, Any]:
    """Return what a report says of a row that is not written."""
    there = {} if row.value is None else {"row": row.value}
    several = {"rows": row.rows} if row.rows > 1 else {}
    return {"file": row.file, "line": row.line, "reason": reason, **several, **there}


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
    plain: dict[str, Any] = _as_json(report, "", lambda value, _: f"({type(value).__name__})")
    return plain


def _refused(value: object, column: str) -> Any:
    kind = type(value).__name__
    raise DataError(
        f"data.path: the column '{column}' holds a value of type {kind}, for which JSON has no "
        "form; write the table without that column, or with text in it"
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
        case str() | int() | float() | None:
            return value
    return otherwise(value, column)


def write_rows(path: Path, values: Iterable[object]) -> int:
    """Write rows as JSON Lines and return their number; `path` is a temporary one."""
    count = 0
    with path.open("wb") as file:
        for value in values:
            file.write(json_line(value))
            count += 1
    return count
