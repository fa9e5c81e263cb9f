"""Convert rows to examples, count what is not used of them, and word the errors on bad rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rayfin.config.data import DataConfig
from rayfin.data.columns import (
    COLUMNS,
    RowProblem,
    RowReader,
    UnsupportedContent,
    ignore_setting,
    is_blank,
    names_in,
)
from rayfin.data.rows import BadRow, Row
from rayfin.data.shapes import fitting_shape, nearest_shape, to_example
from rayfin.data.splits import Split, SplitSelection
from rayfin.errors import DataError, did_you_mean
from rayfin.objectives import Objective
from rayfin.samples import Example


@dataclass
class RowStatistics:
    """Converts rows to examples, and counts them and what of them is not used."""

    ignore: frozenset[str] = frozenset()
    """The columns, and keys of turns, that are ignored."""
    rows: int = 0
    """The number of rows that were read, bad ones included."""
    samples: int = 0
    """The number of rows that became examples."""
    unused: Counter[str] = field(default_factory=Counter)
    """The number of rows with each unused column, or key of turns (`messages.name`)."""
    names: set[str] = field(default_factory=set)
    """The names of all columns and keys; filled only where some are ignored."""
    row_like_lines: int = 0
    """The number of lines within quoted cells that look like rows of their own."""
    suspect_rows: list[str] = field(default_factory=list)
    """FILE:LINE of each row that has such lines."""

    def convert(self, row: Row, shape: str) -> Example | str:
        """Return the row as an example, or the reason why it can't be one."""
        self.rows += row.rows
        if row.problem is not None:
            return row.problem
        if row.row_like_lines:
            self.row_like_lines += row.row_like_lines
            self.suspect_rows.append(f"{row.file}:{row.line}")
        if self.ignore:
            self.names.update(names_in(row.value))
        reader = RowReader(self.ignore)
        try:
            example = to_example(row.value, shape, reader)
        except UnsupportedContent as problem:
            return str(problem)
        except RowProblem as problem:
            other = fitting_shape(row.value, self.ignore)
            if other is not None and other != shape:
                return (
                    f"has format {other}, but the data has format {shape}; all rows need the same"
                )
            return str(problem)
        self.samples += 1
        self.unused.update(reader.unused)
        return example

    def add(self, other: RowStatistics) -> None:
        """Add the counts of other rows to these."""
        self.rows += other.rows
        self.samples += other.samples
        self.unused += other.unused
        self.names |= other.names
        self.row_like_lines += other.row_like_lines
        self.suspect_rows += other.suspect_rows

    def notes(self, skipped: int, first: BadRow | None) -> tuple[str, ...]:
        """Return a line on each of: unused columns, suspect quotes, and rows that are left out.

        `skipped` is the number of bad rows, and `first` the first of them.
        """
        notes = []
        if self.unused:
            names = sorted(self.unused)
            some = {n: f" ({self.unused[n]} of {self.samples} rows)" for n in names}
            # A name may be anything, and goes to a terminal.
            shown = {n: n if n.isprintable() else ascii(n)[1:-1] for n in names}
            listed = ", ".join(shown[n] + some[n] * (self.unused[n] < self.samples) for n in names)
            notes.append(
                f"data: not used, and not trained on: {listed}; where that is meant, set "
                f"{ignore_setting(names)}"
            )
        if self.suspect_rows:
            lines, rows = self.row_like_lines, len(self.suspect_rows)
            notes.append(
                f"data: {f'{lines} lines' if lines > 1 else '1 line'} within quoted cells of "
                f"{f'{rows} rows' if rows > 1 else '1 row'} may be rows of their own, first "
                f"{self.suspect_rows[0]}; where that is so, take out the quotes around them"
            )
        if first is not None:
            notes.append(f"data: {skipped} of {self.rows} rows are bad and left out, first {first}")
        return tuple(notes)

    def check_ignored(self) -> None:
        """Raise DataError for a name in data.ignore_columns that no row has."""
        for name in sorted(self.ignore - self.names):
            has = f"the rows have {', '.join(sorted(self.names)[:20])}" if self.names else ""
            raise DataError(
                f"data.ignore_columns: no row has '{name}'{did_you_mean(name, self.names)}; "
                f"{has or 'leave it out'}"
            )


def _unknown_columns(row: object) -> str:
    """Return why a row that has no column of any format can't be used."""
    need = " | ".join(", ".join(columns) for columns in COLUMNS.values())
    if not isinstance(row, Mapping):
        return "a row must be an object with columns"
    have = ", ".join(str(name) for name in list(row)[:8]) or "none"
    return f"it has none of the known columns: rename {have} to those of a format: {need}"


def no_valid_row_error(config: DataConfig, first: BadRow, instead: str = "") -> DataError:
    """Return the error for data without a valid row; `first` is the first bad one."""
    return DataError(f"data.path: '{config.path}' has no valid row (the first: {first}){instead}")


def bad_rows_error(first: BadRow, bad: int, rows: int) -> DataError:
    """Return the error of data.on_bad_row=error; `first` is the first of `bad` bad rows."""
    count = f" ({bad} of {rows} rows are bad)" if bad > 1 else ""
    return DataError(
        f"data: {first}{count}; mend the file, or leave such rows out with data.on_bad_row=skip"
    )


def check_shape(config: DataConfig, shape: str, objective: Objective) -> None:
    """Raise DataError for rows of a format that the objective can't train on.

    `shape` may be several formats, separated by commas, as that of a corpus.
    """
    shape = next((each for each in shape.split(", ") if each not in objective.shapes), "")
    if not shape:
        return
    has = f"rows of format {shape}"
    remedy = f"give rows of format {' or '.join(objective.shapes)}"
    if shape == "preference":
        has = "preference pairs (chosen, rejected)"
        if "prompt_completion" in objective.shapes:
            remedy = "give the chosen answers as prompt and completion"
    raise DataError(
        f"data.path: '{config.title}' has {has}, which train.stage={objective.name} can't train "
        f"on; {remedy}"
    )


def empty_split_error(config: DataConfig, split: Split, instead: str) -> DataError:
    """Return the error for a split without a row."""
    which = f": split {split.name} ({split.description})" if split.name else ""
    return DataError(
        f"data.path: '{config.path}'{which} is empty; give a source that has rows{instead}"
    )


def alternative_to(split: Split, selection: SplitSelection) -> str:
    """Return the other setting that helps where a split has no usable row, or an empty text."""
    if split is not selection.eval:
        return ""
    return f"; data.split={selection.train.name} evaluates on rows held out of training instead"


def _has_pair(row: object, ignore: frozenset[str]) -> bool:
    """Return whether both answers of a preference pair are there, readable or not."""
    return isinstance(row, Mapping) and not any(
        name in ignore or is_blank(row.get(name), text=True) for name in COLUMNS["preference"]
    )


def detect_shape(rows: Sequence[Row], config: DataConfig) -> str:
    """Return `data.format`, or for `auto` the format of the first row that has one.

    Raises DataError where no row has one.
    """
    if config.format != "auto":
        return config.format
    ignore = frozenset(config.ignore_columns)
    for row in rows:
        if row.problem is None and (shape := fitting_shape(row.value, ignore)):
            # A pair that can't be read is no conversation, whatever else its row has.
            return "preference" if _has_pair(row.value, ignore) else shape
    # Nothing fits: say what is wrong by the shape that the first row seems to be meant as.
    first = rows[0]
    if first.problem is None and (near := nearest_shape(first.value, ignore)):
        if near == "preference":  # whether it may be trained on comes first
            return near
        reason = str(RowStatistics(ignore).convert(first, near))
    else:
        reason = first.problem or _unknown_columns(first.value)
    raise no_valid_row_error(config, BadRow(first.file, first.line, reason))
