"""What the user says of a table's rows: the names of its columns, and those to leave out."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass, field

from rayfin.config.data import DataConfig
from rayfin.data.columns import COLUMNS, OPTIONAL, OTHER_NAMES
from rayfin.errors import DataError, did_you_mean

WORKBOOK = ".xlsx"
"""The suffix of workbooks whose sheets are read as tables."""


@dataclass(frozen=True)
class RowSettings:
    """The settings by which rows are read: data.columns, data.ignore_columns, data.encoding."""

    ignore: frozenset[str] = frozenset()
    """The columns, and keys of turns, that are ignored."""
    columns: tuple[tuple[str, str], ...] = ()
    """(a format's column, the name that it has in the table) of each that the user named."""
    encoding: str | None = None
    """The encoding of text files, `utf-8` by whatever name; None is what their bytes say."""
    whole: bool = False
    """Whether the values of a table that are not trained on are read too, to be written again."""
    sheet: str | None = None
    """The sheet of a workbook; None is its first."""
    named: frozenset[str] = field(init=False)
    """The formats' columns that the user named."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "named", frozenset(column for column, _ in self.columns))

    @classmethod
    def of(cls, config: DataConfig) -> RowSettings:
        """Return the settings of a configuration; raises DataError where they can't be meant."""
        _check_columns(config)
        encoding = config.encoding
        if encoding is not None:
            encoding = _checked_encoding(encoding, config.streaming)
        sheet = config.name if config.path.lower().endswith(WORKBOOK) else None
        ignored, columns = frozenset(config.ignore_columns), tuple(config.columns.items())
        return cls(ignored, columns, encoding, sheet=sheet)

    def column_of(self, name: str) -> str | None:
        """Return the format's column that a column of the table is, None for one that is no one's.

        A column that the user did not name is its own, unless the user named another for it.
        """
        for column, own in self.columns:
            if own == name:
                return column
        return None if name in self.named else name

    def name_of(self, column: str) -> str:
        """Return the name that the user gave a format's column in the table, or its own."""
        return next((own for each, own in self.columns if each == column), column)

    def shapes(self) -> list[str]:
        """Return the formats that have all of the columns that the user named."""
        return [shape for shape in COLUMNS if self.named <= _columns_of(shape)]


NO_SETTINGS = RowSettings()
"""The settings where the user gave none."""


def _columns_of(shape: str) -> set[str]:
    return {*COLUMNS[shape], *OPTIONAL[shape]}


def _meant(columns: Mapping[str, str]) -> dict[str, str]:
    """Return the names of a format's columns that are given by other names, or the wrong way round.

    Empty where they are neither.
    """
    turned = {name: column for column, name in columns.items()}
    for shape, others in OTHER_NAMES.items():
        for names in (columns, turned):
            own = [name if name in _columns_of(shape) else others.get(name) for name in names]
            if None not in own and len({*own}) == len(own):
                return {str(of): name for of, name in zip(own, names.values(), strict=True)}
    return {}


def _check_columns(config: DataConfig) -> None:
    known = sorted({column for shape in COLUMNS for column in _columns_of(shape)})
    for column in config.columns:
        if column not in known:
            pairs = ", ".join(f"{of}: {name}" for of, name in _meant(config.columns).items())
            perhaps = f"; perhaps 'data.columns={{{pairs}}}' is meant" if pairs else ""
            raise DataError(
                f"data.columns: '{column}' is no column of a format{did_you_mean(column, known)}"
                f"{perhaps}; give {', '.join(known)} the names that they have in the table"
            )
    owners: dict[str, str] = {}
    for column, name in config.columns.items():
        if name in owners:
            raise DataError(
                f"data.columns: {owners[name]} and {column} are both '{name}'; give each a column "
                "of its own"
            )
        if name in config.ignore_columns:
            raise DataError(
                f"data.columns: {column} is '{name}', which data.ignore_columns leaves out; take "
                "it out of one of the two"
            )
        owners[name] = column
    shapes = COLUMNS if config.format == "auto" else [config.format]
    if not any(config.columns.keys() <= _columns_of(shape) for shape in shapes):
        formats = "; ".join(f"{s}: {', '.join(sorted(_columns_of(s)))}" for s in shapes)
        raise DataError(
            f"data.columns: no format has {' and '.join(config.columns)} together; what each has "
            f"is {formats}"
        )


def _checked_encoding(name: str, streaming: bool) -> str:
    """Return an encoding as the user names it, but UTF-8, marked or not, as `utf-8`."""
    try:
        known = codecs.lookup(name).name
        line_end = "\n".encode(known)  # LookupError for a codec of no text
    except LookupError:
        raise DataError(
            f"data.encoding: '{name}' is no encoding of text that Python knows; give utf-8, "
            "utf-16, gb18030, big5, shift_jis, euc_kr, windows-1252, windows-1251, …, or leave "
            "it out"
        ) from None
    if known in ("utf-8", "utf-8-sig"):
        return "utf-8"
    if streaming and line_end != b"\n":
        raise DataError(
            f"data.encoding: '{name}' can't be read in parts; convert the files with iconv -f "
            f"{name} -t utf-8, or set data.streaming=false"
        )
    return name
