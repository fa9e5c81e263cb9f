"""Divide a data set into files for training, validation and test, once and for all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayfin.config import Config
from rayfin.data.load import hold_out
from rayfin.data_tools.new_files import check_new, write_new_directory
from rayfin.data_tools.row_files import MADE_BY, RowWriter, as_report, json_line, read_whole
from rayfin.errors import ConfigError, DataError
from rayfin.samples import Example


def split_data(
    config: Config, directory: Path, *, val_size: float, test_size: float = 0.0
) -> dict[str, Any]:
    """Write train.jsonl, validation.jsonl and, with `test_size`, test.jsonl into a new directory.

    Rows stay as they are, in their order. Which go where is decided by a hash of their content, as
    data.val_size does it: rows with the same prompt stay together. Returns the report, which is
    written as report.json, with the rows that can't be used. Raises DataError for too few different
    rows and for values that JSON has no form for, other than those of data.ignore_columns, which
    are left out; raises StorageError where the directory exists.
    """
    if not 0 < val_size < 1 or not 0 <= test_size < 1 or val_size + test_size >= 1:
        raise ConfigError(
            f"val_size {val_size:g} and test_size {test_size:g} must be shares of the rows that "
            "leave some to train on; give 0.1 and 0.1, say"
        )
    check_new(directory)
    read = read_whole(config)
    rest: Sequence[Example] = [example for _, example in read.rows]
    of: dict[str, str] = {}
    for name, size in (("test", test_size), ("validation", val_size)):
        if not size:
            continue
        if len({example.canonical() for example in rest}) < 2:
            raise DataError(
                f"data.path: '{config.data.path}' has too few different rows for a {name} split; "
                "give more rows, or fewer splits"
            )
        rest, held = hold_out(rest, size * len(read.rows) / len(rest))
        of |= {example.canonical(): name for example in held}
    names = ["train", "validation", *(["test"] if test_size else [])]
    writer = RowWriter(config.data.ignore_columns)
    with write_new_directory(directory) as temporary:
        counts = {
            name: writer.write(
                temporary / f"{name}.jsonl",
                (row.value for row, it in read.rows if of.get(it.canonical(), "train") == name),
            )
            for name in names
        }
        report = as_report(
            {
                MADE_BY: "rayfin data split",
                "path": config.data.path,
                "shape": read.shape,
                "rows": read.count,
                **counts,
                "notes": [*read.notes, *writer.notes()],
                "left_out": read.left_out,
            }
        )
        (temporary / "report.json").write_bytes(json_line(report))
    return report
