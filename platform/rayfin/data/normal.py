"""What makes rows samples, and samples comparable: normal form, and the hashes that order them."""

from __future__ import annotations

import hashlib

from rayfin.config.schema import DataConfig
from rayfin.data.examples import BadRow, Example
from rayfin.data.rows import Row
from rayfin.data.shapes import COLUMNS, RowProblem, fitting_shape, to_example
from rayfin.errors import DataError

# Changing a salt changes every split that was ever made: histories would no longer compare.
ORDER_SALT = "rayfin/order/1"
EVAL_SALT = "rayfin/eval/1"


def content_hash(salt: str, content: str) -> str:
    return hashlib.sha256(f"{salt}\n{content}".encode()).hexdigest()


def example_or_reason(row: Row, shape: str) -> Example | str:
    """The row as a sample, or why it is none."""
    if row.problem is not None:
        return row.problem
    try:
        return to_example(row.value, shape)
    except RowProblem as problem:
        other = fitting_shape(row.value)
        if other is not None and other != shape:
            return f"has format {other}, but the data has format {shape}; all rows need the same"
        return str(problem)


def no_valid_row(config: DataConfig, first: BadRow) -> DataError:
    if config.format == "auto":
        need = " | ".join(", ".join(columns) for columns in COLUMNS.values())
    else:
        need = ", ".join(COLUMNS[config.format])
    return DataError(
        f"data.path: '{config.path}' has no valid row (the first: {first}); "
        f"give rows with the columns {need}"
    )


def bad_rows(first: BadRow, bad: int, rows: int) -> DataError:
    """What data.on_bad_row=error says of the first of `bad` bad rows."""
    count = f" ({bad} of {rows} rows are bad)" if bad > 1 else ""
    return DataError(
        f"data: {first}{count}; mend the file, or leave such rows out with data.on_bad_row=skip"
    )


def is_preference(path: str) -> DataError:
    return DataError(
        f"data.path: '{path}' has preference pairs (chosen, rejected), which "
        "train.stage=sft can't train on; give the chosen answers as prompt and completion"
    )
