"""Write a data set with its texts cleaned, and the rows left out to a file of their own."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from rayfin.config import Config
from rayfin.data.folders import LEFT_OUT
from rayfin.data.rows import Row
from rayfin.data.splits import count_rows
from rayfin.data_tools.new_files import check_new, write_new
from rayfin.data_tools.reports import check_target, write_report
from rayfin.data_tools.row_cleaning import RowCleaner
from rayfin.data_tools.row_files import (
    MADE_BY,
    READING_SETTINGS,
    RowStream,
    RowWriter,
    json_line,
    unused_settings,
)
from rayfin.data_tools.text_cleaning import CHANGES, TextCleaner, UnicodeForm
from rayfin.errors import ConfigError, DataError
from rayfin.samples import Example

_PLACES = 10
"""The rows that a report names of each kind of change."""


@dataclass(frozen=True)
class CleaningRules:
    """What is changed of texts, and which rows are left out."""

    min_chars: int = 1
    """The fewest characters of a learned answer, or of a plain text."""
    max_chars: int | None = None
    """The most characters of a learned answer, or of a plain text."""
    keep: tuple[str, ...] = ()
    """The kinds of changes that are not made (`CHANGES`)."""
    unicode_form: UnicodeForm | None = None
    """The form of Unicode that texts are normalised to."""

    def __post_init__(self) -> None:
        if self.min_chars < 1:
            raise ConfigError(f"--min-chars: {self.min_chars} is not allowed; give 1 or more")
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ConfigError(
                f"--max-chars: {self.max_chars} is less than --min-chars, {self.min_chars}; give "
                "that or more"
            )
        for name in self.keep:
            if name not in CHANGES:
                raise ConfigError(f"--keep: '{name}' is not one of {', '.join(CHANGES)}")


def left_out_beside(target: Path) -> Path:
    """Return the file of the rows that are left out of `target`."""
    return target.with_suffix(LEFT_OUT)


def clean_data(config: Config, target: Path, rules: CleaningRules | None = None) -> dict[str, Any]:
    """Write the rows with their texts cleaned, and those that can't be used to another file.

    That file (`NAME.left_out.jsonl`) has the rows as they were, and none is there without such
    rows. Returns the report but for its list of them, which is written (`NAME.report.json`) with
    it. Raises DataError where no row remains, StorageError where one of the files exists.
    """
    report_file, aside_file = check_target(target), left_out_beside(target)
    check_new(aside_file)
    stream = RowStream(config)
    work = _Cleaning(stream, rules or CleaningRules(), RowWriter(config.data.ignore_columns))
    with (
        write_new(target) as first,
        write_new(report_file) as last,
        tempfile.TemporaryFile(dir=target.parent) as reasons,
        suppress(_NothingLeftOut),
        write_new(aside_file) as aside_path,
    ):
        with first.open("wb") as kept, aside_path.open("wb") as aside:
            work.run(kept, aside, reasons)
        stream.check(may_skip=True)
        report = {
            MADE_BY: "rayfin data clean",
            "path": config.data.path,
            "format": stream.shape,
            **asdict(work.rules),
            **work.counts(first),
            "left_out_file": aside_file.name if work.aside else None,
            "notes": [
                *stream.reading_notes(),
                *work.notes(),
                *unused_settings(config, {*READING_SETTINGS} - {"on_bad_row"}),
            ],
        }
        reasons.seek(0)
        write_report(last, report, map(json.loads, reasons))
        if not work.aside:
            raise _NothingLeftOut
    return report


class _NothingLeftOut(Exception):
    """There is no row for a file of those left out."""


class _Cleaning:
    """Cleans rows one after the other, and counts what becomes of them."""

    def __init__(self, stream: RowStream, rules: CleaningRules, writer: RowWriter) -> None:
        self.rules, self._stream, self._writer = rules, stream, writer
        self._texts = TextCleaner(rules.keep, rules.unicode_form)
        self._rows = RowCleaner(stream.shape, stream.settings, self._texts)
        self._read = self._written = self._changed = self._unwritable = 0
        self._reasons: Counter[str] = Counter()
        self._places: Counter[str] = Counter()
        self._changed_rows: Counter[str] = Counter()
        self._first: dict[str, list[str]] = {}
        self._replaced: list[str] = []
        self._replaced_rows = 0
        self.aside = 0
        """The lines of the file of rows left out."""

    def run(self, kept: IO[bytes], aside: IO[bytes], reasons: IO[bytes]) -> None:
        """Write each row to `kept`, or to `aside` and why it is there to `reasons`."""
        for row in self._stream.rows():
            self._read += row.rows
            self._texts.counts.clear()
            self._texts.has_replacements = False
            value = self._rows.clean(row.value)
            example = self._stream.convert(row._replace(value=value))
            found = self._why_left_out(row, value, example)
            if found is None:
                value = {"messages": value} if isinstance(value, list) else value
                kept.write(self._writer.line(value))
                self._count_kept(row)
            else:
                kind, reason = found
                self._reasons[kind] += row.rows
                entry = {"file": row.file, "line": row.line, "kind": kind, "reason": reason}
                if row.rows > 1:
                    entry["rows"] = row.rows
                if line := self._as_it_was(row):
                    aside.write(line)
                    self.aside += 1
                    entry["left_out_line"] = self.aside
                else:
                    self._unwritable += row.rows
                reasons.write(json_line(entry))

    def _count_kept(self, row: Row) -> None:
        self._written += 1
        if self._texts.has_replacements:
            self._replaced_rows += 1
            self._replaced = self._replaced or [f"{row.file}:{row.line}"]
        if not self._texts.counts:
            return
        self._changed += 1
        self._places += self._texts.counts
        for kind in self._texts.counts:
            self._changed_rows[kind] += 1
            first = self._first.setdefault(kind, [])
            if len(first) < _PLACES:
                first.append(f"{row.file}:{row.line}")

    def _why_left_out(
        self, row: Row, value: object, example: Example | str
    ) -> tuple[str, str] | None:
        """Return (kind, reason) of a row that is left out, or None."""
        if row.problem is not None:
            return "unreadable", row.problem
        if isinstance(example, str):
            if name := self._rows.without_value(value):
                return "empty", f"{name} is empty"
            empty = example.endswith((" is empty", " is missing"))
            return "empty" if empty else "unusable", example
        what = "text" if example.text is not None else "answer"
        least, most = self.rules.min_chars, self.rules.max_chars
        lengths = [len(answer) for answer in _answers(example)]
        if lengths and min(lengths) < least:
            said = f"the {what} has {_count(min(lengths))}, fewer than --min-chars={least}"
            return "too short", said
        if lengths and most is not None and max(lengths) > most:
            return (
                "too long",
                f"the {what} has {_count(max(lengths))}, more than --max-chars={most}",
            )
        return None

    def _as_it_was(self, row: Row) -> bytes:
        """Return a row that is left out as a line: as it stood, or the text that is no row."""
        if row.problem is None:
            return self._writer.line(row.value)
        raw = row.raw.strip()
        if raw[:1] == b"{" and b"\n" not in raw:
            return raw + b"\n"
        return json_line({"unreadable": raw.decode(errors="surrogateescape")}) if raw else b""

    def counts(self, written: Path) -> dict[str, Any]:
        """Return the numbers of the report; raises DataError where a row is unaccounted for."""
        left_out = self._reasons.total()
        if not self._written:
            reasons = ", ".join(f"{count} {kind}" for kind, count in self._reasons.items())
            raise DataError(
                f"data.path: no row would remain: {reasons}; nothing is written. Give rows with "
                "answers, or other limits of their length"
            )
        with written.open("rb") as file:
            lines = sum(1 for _ in file)
        if not lines == self._written == self._read - left_out == self._stream.count - left_out:
            raise DataError(
                f"data.path: of {self._read} rows {lines} were written and {left_out} left out, "
                "which do not add up, and nothing is written; report it"
            )
        return {
            "rows": self._read,
            "written": self._written,
            "left_out_rows": left_out,
            "reasons": dict(self._reasons),
            "changed": self._changed,
            "changes": {
                kind: {"rows": rows, "places": self._places[kind], "first": self._first[kind]}
                for kind, rows in self._changed_rows.most_common()
            },
        }

    def notes(self) -> Iterator[str]:
        """Yield a line on each thing that cleaning can't mend."""
        yield from self._writer.notes()
        if self._replaced_rows:
            yield (
                f"{count_rows(self._replaced_rows)} with U+FFFD, for characters that were lost "
                f"before, first {self._replaced[0]}; where they matter, export the data again"
            )
        if self._unwritable:
            yield (f"{count_rows(self._unwritable)} can't even be copied; mend them in the data")


def _count(characters: int) -> str:
    return "1 character" if characters == 1 else f"{characters} characters"


def _answers(example: Example) -> Iterator[str]:
    """Yield the answers that are learned, or a plain text; a call of tools alone is none."""
    if example.text is not None:
        yield example.text
    first = next((n for n, turn in enumerate(example.messages) if turn["role"] == "user"), 0)
    for number, turn in enumerate(example.messages):
        learned = turn["role"] == "assistant" and number > first
        if learned and number not in example.unlearned and _says(turn):
            yield turn["content"]
    if example.rejected and _says(example.rejected[-1]):
        yield example.rejected[-1]["content"]


def _says(turn: dict[str, Any]) -> bool:
    return bool(turn["content"]) or "tool_calls" not in turn
