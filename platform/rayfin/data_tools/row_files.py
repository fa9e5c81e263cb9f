"""Read the rows of one data set with what they become, and write rows and reports whole."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayfin.config import Config
from rayfin.data.conversion import (
    RowStatistics,
    bad_rows_error,
    detect_shape,
    empty_split_error,
)
from rayfin.data.row_settings import RowSettings
from rayfin.data.rows import BadRow, Row
from rayfin.data.sources import find_splits, read_rows
from rayfin.errors import ConfigError, DataError
from rayfin.samples import Example

MADE_BY = "made_by"
"""The key of a report, by which `rayfin.data.folders` knows that it holds no rows."""


@dataclass
class ReadRows:
    """The rows of a data set."""

    shape: str
    """Their format, as `data.format` names it."""
    rows: list[tuple[Row, Example]] = field(default_factory=list)
    """The rows that can be used, with the samples that they are."""
    left_out: list[dict[str, Any]] = field(default_factory=list)
    """The others: file, line and reason, and what stands there if it can be read."""


def read_whole(config: Config) -> ReadRows:
    """Read all rows of `data.path`.

    Raises DataError where it has splits of its own, and for a bad row unless data.on_bad_row=skip.
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
    settings = RowSettings.of(data)
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
    statistics.check_names()
    return found


def left_out(row: Row, reason: str) -> dict[str, Any]:
    """Return what a report says of a row that is not written."""
    there = {} if row.value is None else {"row": row.value}
    return {"file": row.file, "line": row.line, "reason": reason, **there}


def json_line(value: object) -> bytes:
    """Return a value as a line of JSON; raises DataError for what JSON has no form for."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"data: a row can't be written as JSON ({error}); leave such columns out of the table"
        ) from error
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half of a character, which JSON can only escape
        return json.dumps(value).encode() + b"\n"


def write_rows(path: Path, values: Iterable[object]) -> int:
    """Write rows as JSON Lines and return their number; `path` is a temporary one."""
    count = 0
    with path.open("wb") as file:
        for value in values:
            file.write(json_line(value))
            count += 1
    return count
