"""Print tables with whole headers and cells at any width of the terminal, uncut in a pipe."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayfin.redaction import printable

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderableType

_UNBOUNDED = 100_000
"""The width of a pipe, which is unlimited."""
_GAP = 2
_LEAST_FOLDED = 12
"""The least width of a folded column, below which it can't be read."""

Cell = str | Text


@dataclass(frozen=True)
class TableColumn:
    """A column of a table, and how it gives way where there is little room."""

    name: str
    right: bool = False
    """Whether cells are aligned to the right."""
    folds: bool = False
    """Whether cells may continue in a second line; cells to be copied or compared don't."""
    leaves: int = 0
    """Columns with the largest number are left out first; those with 0 never are."""


class TextTable:
    """A table that is laid out for the width of the terminal when it is printed.

    Where there is little room, headers continue in a second line first, then cells that may; then
    columns are left out and named in a line below. If that is not enough, each row becomes a block
    of lines.
    """

    def __init__(
        self, columns: Sequence[TableColumn], rows: Sequence[Sequence[Cell]], *, title: str = ""
    ) -> None:
        self._columns, self._title = columns, title
        # Text, so that brackets in a name or path are not taken for markup.
        self._rows = [[_shown(cell) for cell in row] for row in rows]

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        room = options.max_width
        shown = list(range(len(self._columns)))
        left_out: list[str] = []
        while (widths := self._widths(shown, room)) is None:
            last = max(shown, key=lambda i: (self._columns[i].leaves, i))
            if not self._columns[last].leaves:
                yield from self._blocks()
                return
            shown.remove(last)
            left_out.append(self._columns[last].name)
        yield self._table(shown, widths)
        if left_out:
            names = ", ".join(reversed(left_out))
            yield Text(f"not shown in {room} columns: {names}; --json shows all", style="dim")

    def _widths(self, shown: Sequence[int], room: int) -> list[int] | None:
        """Return the columns' widths, or None where they don't fit."""
        gaps = _GAP * (len(shown) - 1)
        natural = [max(cell_len(self._columns[i].name), self._longest(i)) for i in shown]
        if sum(natural) + gaps <= room:
            return natural
        headers = [max(map(cell_len, _parts(self._columns[i].name))) for i in shown]
        narrow = [max(header, self._longest(i)) for header, i in zip(headers, shown, strict=True)]
        if sum(narrow) + gaps <= room:
            return narrow
        folding = [place for place, i in enumerate(shown) if self._columns[i].folds]
        over = sum(narrow) + gaps - room
        for place in sorted(folding, key=lambda place: -narrow[place]):
            less = min(over, max(0, narrow[place] - max(_LEAST_FOLDED, headers[place])))
            narrow[place] -= less
            over -= less
        return narrow if over <= 0 else None

    def _longest(self, column: int) -> int:
        lines = (line for row in self._rows for line in row[column].plain.splitlines())
        return max(map(cell_len, lines), default=0)

    def _table(self, shown: Sequence[int], widths: Sequence[int]) -> Table:
        headed = any(column.name for column in self._columns)
        table = Table(
            box=box.SIMPLE_HEAD if headed else None,
            show_header=headed,
            show_edge=False,
            padding=(0, _GAP - headed, 0, 0),  # the box has a space of its own
            pad_edge=False,
            collapse_padding=True,
            title=self._title or None,
        )
        for i, width in zip(shown, widths, strict=True):
            column = self._columns[i]
            table.add_column(
                Text(_folded(column.name, width)),
                justify="right" if column.right else "left",
                width=width,
                overflow="fold",
            )
        for row in self._rows:
            table.add_row(*(row[i] for i in shown))
        return table

    def _blocks(self) -> Iterator[RenderableType]:
        if self._title:
            yield Text(self._title)
        for row in self._rows:
            for column, cell in zip(self._columns, row, strict=True):
                if cell.plain:
                    yield Text.assemble(f"{column.name}: ", cell, overflow="fold")
            yield Text("")


def output(*, stderr: bool = False) -> Console:
    """Return a console on standard output or error; in a pipe it never folds or cuts."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _UNBOUNDED
    return Console(stderr=stderr, highlight=False, width=width)


def _shown(cell: Cell) -> Text:
    text = cell if isinstance(cell, Text) else Text(cell)
    text.plain = printable(text.plain)  # of the same length, so that styles stay where they are
    return text


def _parts(name: str) -> list[str]:
    """Split a header where it may continue in the next line: `learning_rate` at `_`."""
    return re.findall(r"[^_ ]*(?:[_ ]|$)", name)[:-1] or [name]


def _folded(name: str, width: int) -> str:
    lines = [""]
    for part in _parts(name):
        if lines[-1] and cell_len((lines[-1] + part).rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)
