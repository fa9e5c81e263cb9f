"""Convert rows to examples, count what is not used of them, and word the errors on bad rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rayfin.config.data import DataConfig
from rayfin.data.columns import COLUMNS, OPTIONAL, is_blank
from rayfin.data.row_reader import (
    RowProblem,
    RowReader,
    UnsupportedContent,
    ignore_setting,
    names_in,
)
from rayfin.data.row_settings import RowSettings
from rayfin.data.rows import BadRow, Row
from rayfin.data.shapes import fitting_shape, nearest_shape, no_object, to_example
from rayfin.data.splits import Split, SplitSelection
from rayfin.data.suggestions import suggestion
from rayfin.errors import DataError, did_you_mean
from rayfin.objectives import Objective
from rayfin.samples import Example


@dataclass
class RowStatistics:
    """Converts rows to examples, and counts them and what of them is not used."""

    settings: RowSettings = field(default_factory=RowSettings)
    rows: int = 0
    """The number of rows that were read, bad ones included."""
    samples: int = 0
    """The number of rows that became examples."""
    unused: Counter[str] = field(default_factory=Counter)
    """The number of rows with each unused column, or key of turns (`messages.name`)."""
    names: set[str] = field(default_factory=set)
    """The names of all columns and keys; filled only where settings name some."""
    other_names: set[tuple[str, str, str]] = field(default_factory=set)
    """(format, column, name) of the columns that were recognised by another name."""
    columns: set[tuple[str, str]] = field(default_factory=set)
    """(format's column, name) of the columns that settings name."""
    read_as: dict[str, str] = field(default_factory=dict)
    """What each file was read as of which that was guessed: its encoding, its sheet."""
    row_like_lines: int = 0
    """The number of lines within quoted cells that look like rows of their own."""
    spelled_turns: Counter[tuple[str, bool]] = field(default_factory=Counter)
    """The rows with the JSON text of turns in (column, whether turns are made of it)."""
    suspect_rows: list[str] = field(default_factory=list)
    """FILE:LINE of each row that has such lines."""

    def __post_init__(self) -> None:
        self._reader = RowReader(self.settings)
        self.columns.update(self.settings.columns)

    def convert(self, row: Row, shape: str) -> Example | str:
        """Return the row as an example, or the reason why it can't be one."""
        self.rows += row.rows
        if row.read_as:
            self.read_as[row.file] = row.read_as
        if row.problem is not None:
            return row.problem
        if row.row_like_lines:
            self.row_like_lines += row.row_like_lines
            self.suspect_rows.append(f"{row.file}:{row.line}")
        if self.settings.ignore or self.settings.columns:
            self.names.update(names_in(row.value))
        reader = self._reader
        reader.begin_row()
        try:
            example = to_example(row.value, shape, reader)
        except UnsupportedContent as problem:
            return str(problem)
        except RecursionError:
            return "holds lists or objects within each other so deeply that they can't be read"
        except RowProblem as problem:
            other = fitting_shape(row.value, self.settings)
            if other is not None and other != shape:
                return (
                    f"has format {other}, but the data has format {shape}; all rows need the same;"
                    " put each format's rows into a file of its own, and name both in data.sources"
                )
            return str(problem)
        self.samples += 1
        if reader.spelled_turns:
            self.spelled_turns.update(reader.spelled_turns.items())
        if reader.unused:
            self.unused.update(reader.unused)
        if reader.other_names:
            self.other_names.update((shape, *pair) for pair in reader.other_names.items())
        return example

    def add(self, other: RowStatistics) -> None:
        """Add the counts of other rows to these."""
        self.rows += other.rows
        self.samples += other.samples
        self.unused += other.unused
        self.names |= other.names
        self.other_names |= other.other_names
        self.columns |= other.columns
        self.read_as |= other.read_as
        self.spelled_turns += other.spelled_turns
        self.row_like_lines += other.row_like_lines
        self.suspect_rows += other.suspect_rows

    def notes(self, skipped: int, first: BadRow | None) -> tuple[str, ...]:
        """Return a line on each of: what was guessed (encodings, names of columns), unused columns,
        suspect quotes, and rows that are left out.

        `skipped` is the number of bad rows, and `first` the first of them.
        """
        notes = [*self._file_notes(), *self._name_notes()]
        if self.unused:
            names = sorted(self.unused)
            some = {n: f" ({self.unused[n]} of {self.samples} rows)" for n in names}
            listed = ", ".join(
                printable(n) + some[n] * (self.unused[n] < self.samples) for n in names
            )
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

    def _file_notes(self) -> Iterator[str]:
        for read_as in sorted(set(self.read_as.values())):
            files = sorted(name for name, of in self.read_as.items() if of == read_as)
            more = f" and {len(files) - 1} more files" if len(files) > 1 else ""
            yield f"data: {files[0]}{more} read as {read_as}"

    def _name_notes(self) -> Iterator[str]:
        for shape in sorted({shape for shape, _, _ in self.other_names}):
            pairs = [pair for of, *pair in self.other_names if of == shape]
            order = (*COLUMNS[shape], *OPTIONAL[shape])
            pairs.sort(key=lambda pair: (order.index(pair[0]), pair[1]))
            listed = ", ".join(f"{column}={printable(name.strip())}" for column, name in pairs)
            yield f"data: read as {shape} ({listed})"
        for (name, turns), count in sorted(self.spelled_turns.items()):
            rows = f"{printable(name)} of {f'{count} rows' if count > 1 else '1 row'}"
            if turns:
                yield (
                    f"data: {rows} read as turns, from the JSON text in the cell; where that text "
                    "is meant, give the rows as JSON Lines"
                )
            else:
                yield (
                    f"data: {rows} read as text, though it is the JSON text of a list of turns; "
                    "where turns are meant, give the list itself"
                )

    def check_names(self) -> None:
        """Raise DataError for a name in data.ignore_columns or data.columns that no row has."""
        for name in sorted(self.settings.ignore - self.names):
            raise _unknown_name("data.ignore_columns", name, self.names)
        for column, name in sorted(self.columns):
            if name not in self.names:
                raise _unknown_name(f"data.columns.{column}", name, self.names)


def printable(name: str) -> str:
    """Return a name as it may be shown: it may be anything, and goes to a terminal."""
    return name if name.isprintable() else ascii(name)[1:-1]


def _unknown_name(setting: str, name: str, names: Collection[str]) -> DataError:
    has = f"the rows have {', '.join(map(printable, sorted(names)[:20]))}" if names else ""
    return DataError(
        f"{setting}: no row has '{name}'{did_you_mean(name, names)}; {has or 'leave it out'}"
    )


def _unknown_columns(row: object) -> str:
    """Return why a row that has no column of any format can't be used."""
    need = " | ".join(", ".join(columns) for columns in COLUMNS.values())
    if not isinstance(row, Mapping):
        return no_object(row)
    have = ", ".join(str(name) for name in list(row)[:8]) or "none"
    more = suggestion(row) or ", or name them with 'data.columns={prompt: ..., completion: ...}'"
    return f"it has none of the known columns: rename {have} to those of a format: {need}{more}"


def no_valid_row_error(config: DataConfig, first: BadRow, instead: str = "") -> DataError:
    """Return the error for data without a valid row; `first` is the first bad one."""
    empty = first.reason.endswith(" is empty")
    remedy = "; fill it in, or name the column that is meant with data.columns" * empty
    return DataError(
        f"data.path: '{config.path}' has no valid row (the first: {first}{remedy}){instead}"
    )


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
            remedy = (
                "give the chosen answers as prompt and completion, or leave the pairs out of rows "
                "that hold a conversation too, with data.ignore_columns=[chosen,rejected]"
            )
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


def _has_pair(row: object, settings: RowSettings) -> bool:
    """Return whether both answers of a preference pair are there, readable or not."""
    if not isinstance(row, Mapping):
        return False
    names = [settings.name_of(column) for column in COLUMNS["preference"]]
    return not any(n in settings.ignore or is_blank(row.get(n), text=True) for n in names)


def detect_shape(rows: Sequence[Row], config: DataConfig) -> str:
    """Return `data.format`, or for `auto` the format of the first row that has one.

    Raises DataError where no row has one, or a column that data.columns gives and a format needs.
    """
    settings = RowSettings.of(config)
    _check_needed(rows, settings)
    if config.format != "auto":
        return config.format
    for row in rows:
        if row.problem is None and (shape := fitting_shape(row.value, settings)):
            # A pair that can't be read is no conversation, whatever else its row has.
            return "preference" if _has_pair(row.value, settings) else shape
    # Nothing fits: say what is wrong by the shape that the first row seems to be meant as.
    first = rows[0]
    if first.problem is None and (near := nearest_shape(first.value, settings)):
        if near == "preference":  # whether it may be trained on comes first
            return near
        reason = str(RowStatistics(settings).convert(first, near))
        if not settings.columns and " missing: format " in reason:
            reason += suggestion(first.value, answered=True)
    else:
        reason = first.problem or _unknown_columns(first.value)
    raise no_valid_row_error(config, BadRow(first.file, first.line, reason))


def _check_needed(rows: Sequence[Row], settings: RowSettings) -> None:
    needed = {column for columns in COLUMNS.values() for column in columns}
    for column, name in settings.columns:
        if column not in needed:  # a row further on may have it
            continue
        if not any(isinstance(row.value, Mapping) and name in row.value for row in rows):
            objects = (row.value for row in rows[:1000] if isinstance(row.value, Mapping))
            names = {str(each) for value in objects for each in value}
            raise _unknown_name(f"data.columns.{column}", name, names)
