"""Convert data of any format that is read, or a page of questions and answers, to JSON Lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayfin.config import Config
from rayfin.data.conversion import RowStatistics
from rayfin.data.row_settings import NO_SETTINGS
from rayfin.data.rows import Row
from rayfin.data_tools.faq import faq_rows, is_markdown
from rayfin.data_tools.new_files import write_new
from rayfin.data_tools.reports import check_target
from rayfin.data_tools.row_files import (
    MADE_BY,
    RowWriter,
    as_report,
    json_line,
    left_out,
    read_whole,
    unused_settings,
)
from rayfin.errors import DataError
from rayfin.samples import Example


def convert_data(config: Config, target: Path) -> dict[str, Any]:
    """Write the data as JSON Lines: prompt and completion, or messages where a row needs them.

    All that is trained on of a row is written, and nothing else. Returns the report, which is
    written beside `target` (`NAME.report.json`), with all that is not written. Raises DataError for
    rows that can't be used unless data.on_bad_row=skip, and StorageError where `target` or the
    report exists.
    """
    report_file = check_target(target)
    source = Path(config.data.path)
    if is_markdown(source):
        rows = list(faq_rows(source))
        values: list[Any] = [row.value for row in rows if row.problem is None]
        lost = [left_out(row, row.problem) for row in rows if row.problem is not None]
        if not values:
            raise DataError(f"data.path: '{source}' has no question with an answer: {_first(lost)}")
        shape, count = "prompt_completion", len(rows)
        notes = unused_settings(config, ())
    else:
        read = read_whole(config)
        examples = [example for _, example in read.rows]
        lost, count, notes = read.left_out, read.count, read.notes
        shape, values = _rows(read.shape, examples)
        _check_same(values, shape, examples)
    report = as_report(
        {
            MADE_BY: "rayfin data convert",
            "path": config.data.path,
            "rows": count,
            "written": len(values),
            "format": shape,
            "notes": notes,
            "left_out": lost,
        }
    )
    with write_new(target) as first, write_new(report_file) as last:
        last.write_bytes(json_line(report))
        RowWriter(()).write(first, values)
    return report


def _first(lost: Sequence[dict[str, Any]]) -> str:
    return f"line {lost[0]['line']}: {lost[0]['reason']}" if lost else "it is empty"


def _rows(shape: str, examples: Sequence[Example]) -> tuple[str, list[Any]]:
    """Return the simplest format that holds all samples, and their rows."""
    if shape == "text":
        return shape, [{"text": example.text} for example in examples]
    if any(example.rejected for example in examples):
        raise DataError(
            "data.path: preference pairs (chosen, rejected) are not converted yet; give rows with "
            "one answer each"
        )
    if all(_is_pair(example) for example in examples):
        return "prompt_completion", [
            {"prompt": each.messages[0]["content"], "completion": each.messages[1]["content"]}
            for each in examples
        ]
    return "messages", [
        {
            "messages": [
                {**turn, "weight": 0} if number in example.unlearned else turn
                for number, turn in enumerate(example.messages)
            ],
            **({"tools": list(example.tools)} if example.tools else {}),
        }
        for example in examples
    ]


def _is_pair(example: Example) -> bool:
    """Whether a sample is a question and an answer and nothing else."""
    return (
        not example.uses_tools
        and not example.unlearned
        and [turn["role"] for turn in example.messages] == ["user", "assistant"]
    )


def _check_same(values: Sequence[Any], shape: str, examples: Sequence[Example]) -> None:
    """Raise DataError where what is written would not be read as the same samples."""
    statistics = RowStatistics(NO_SETTINGS)
    for number, (value, example) in enumerate(zip(values, examples, strict=True), 1):
        again = statistics.convert(Row("", number, value), shape)
        if not isinstance(again, Example) or again.canonical() != example.canonical():
            raise DataError(
                f"data.path: sample {number} would be another one after the conversion "
                f"({again if isinstance(again, str) else 'its text'}); leave it out, and report it"
            )
