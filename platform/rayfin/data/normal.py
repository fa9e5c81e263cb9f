"""What makes rows samples, and samples comparable: normal form, and the hashes that order them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from rayfin.config.schema import DataConfig
from rayfin.data.columns import COLUMNS, Reading, Refused, RowProblem, ignoring, names_in
from rayfin.data.examples import BadRow, Example
from rayfin.data.rows import Row
from rayfin.data.shapes import fitting_shape, to_example
from rayfin.errors import DataError, did_you_mean

# Changing a salt changes every split that was ever made: histories would no longer compare.
ORDER_SALT = "rayfin/order/1"
EVAL_SALT = "rayfin/eval/1"


def content_hash(salt: str, content: str) -> str:
    return hashlib.sha256(f"{salt}\n{content}".encode()).hexdigest()


@dataclass
class Census:
    """What the rows of a source hold besides what is used, counted while they are read."""

    ignore: frozenset[str] = frozenset()
    rows: int = 0
    samples: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    """Column, or key of turns (`messages.name`), that nothing was made of -> rows that have it."""
    names: set[str] = field(default_factory=set)
    """All names of columns and keys; kept only to tell whether what is ignored is there."""
    like_rows: int = 0
    """Lines within quoted cells that look like rows of their own."""
    around: list[str] = field(default_factory=list)
    """FILE:LINE of each row that has such lines."""

    def example_or_reason(self, row: Row, shape: str) -> Example | str:
        """The row as a sample, or why it is none."""
        self.rows += row.rows
        if row.problem is not None:
            return row.problem
        if row.like_rows:
            self.like_rows += row.like_rows
            self.around.append(f"{row.file}:{row.line}")
        if self.ignore:
            self.names.update(names_in(row.value))
        reading = Reading(self.ignore)
        try:
            example = to_example(row.value, shape, reading)
        except Refused as problem:
            return str(problem)
        except RowProblem as problem:
            other = fitting_shape(row.value, self.ignore)
            if other is not None and other != shape:
                return (
                    f"has format {other}, but the data has format {shape}; all rows need the same"
                )
            return str(problem)
        self.samples += 1
        self.unused.update(reading.unused)
        return example

    def add(self, other: Census) -> None:
        """Counts what another has counted, too."""
        self.rows += other.rows
        self.samples += other.samples
        self.unused += other.unused
        self.names |= other.names
        self.like_rows += other.like_rows
        self.around += other.around

    def notes(self, skipped: int, first: BadRow | None) -> tuple[str, ...]:
        """What is to be told: columns that are not used, quotes in doubt, rows left out."""
        told = []
        if self.unused:
            names = sorted(self.unused)
            some = {n: f" ({self.unused[n]} of {self.samples} rows)" for n in names}
            # A name may be anything, and goes to a terminal.
            shown = {n: n if n.isprintable() else ascii(n)[1:-1] for n in names}
            listed = ", ".join(shown[n] + some[n] * (self.unused[n] < self.samples) for n in names)
            told.append(
                f"data: not used, and not trained on: {listed}; where that is meant, set "
                f"{ignoring(names)}"
            )
        if self.around:
            lines, rows = self.like_rows, len(self.around)
            told.append(
                f"data: {f'{lines} lines' if lines > 1 else '1 line'} within quoted cells of "
                f"{f'{rows} rows' if rows > 1 else '1 row'} may be rows of their own, first "
                f"{self.around[0]}; where that is so, take out the quotes around them"
            )
        if first is not None:
            told.append(f"data: {skipped} of {self.rows} rows are bad and left out, first {first}")
        return tuple(told)

    def check_ignored(self) -> None:
        """Raises DataError for a name in data.ignore_columns that no row has."""
        for name in sorted(self.ignore - self.names):
            has = f"the rows have {', '.join(sorted(self.names)[:20])}" if self.names else ""
            raise DataError(
                f"data.ignore_columns: no row has '{name}'{did_you_mean(name, self.names)}; "
                f"{has or 'leave it out'}"
            )


def no_known_column(row: object) -> str:
    """Why a row that has no column of any format is no sample."""
    need = " | ".join(", ".join(columns) for columns in COLUMNS.values())
    if not isinstance(row, Mapping):
        return "a row must be an object with columns"
    have = ", ".join(str(name) for name in list(row)[:8]) or "none"
    return f"it has none of the known columns: rename {have} to those of a format: {need}"


def no_valid_row(config: DataConfig, first: BadRow, instead: str = "") -> DataError:
    """What is said where not one row can be used; `first`: the first one, and why."""
    return DataError(f"data.path: '{config.path}' has no valid row (the first: {first}){instead}")


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
