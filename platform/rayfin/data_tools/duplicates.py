"""Write a data set without the rows that are equal or similar to an earlier one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rayfin.config import Config
from rayfin.data_tools.compared_rows import ComparedRows
from rayfin.data_tools.new_files import write_errors, write_new
from rayfin.data_tools.reports import check_target, write_report
from rayfin.data_tools.row_files import MADE_BY, RowStream
from rayfin.data_tools.similar import Matches


def dedupe_data(
    config: Config,
    target: Path,
    *,
    part: str = "whole",
    threshold: float | None = None,
    embedding_model: str | None = None,
) -> dict[str, Any]:
    """Write the rows that no earlier written row is equal or similar to, as they are, in order.

    Two rows are similar where the Jaccard similarity of `part` of each is at least `threshold`
    (0.8); at 1 only equal rows are duplicates. With `embedding_model`, as model.name gives a model,
    it is the cosine similarity of its embeddings (0.95). Returns the report but for its list of the
    rows left out, which is written beside `target` (`NAME.report.json`) with it: where each stands,
    the row that it duplicates, and their similarity. Raises ConfigError for a threshold or part
    that can't be used, ModelError for such a model, DataError for rows that can't be used unless
    data.on_bad_row=skip, and StorageError where `target` or the report exists.
    """
    report_file = check_target(target)
    stream = RowStream(config)
    by = part, threshold, embedding_model
    with write_errors(target), ComparedRows(target.parent, *by) as rows:
        rows.read(stream)
        matches = rows.matches(np.arange(len(rows)))
        similar = int(np.count_nonzero(matches.other >= 0))
        equal = int(np.count_nonzero(matches.equal))
        report = {
            MADE_BY: "rayfin data dedupe",
            "path": config.data.path,
            "format": stream.shape,
            **rows.comparison(),
            "rows": stream.count,
            "written": stream.count - stream.bad - similar,
            "equal": equal,
            "similar": similar - equal,
            "unusable": stream.bad,
            "notes": [*stream.notes(), *rows.notes(), *incomplete_notes(matches)],
        }
        write_without(target, report_file, report, rows, range(len(rows)), matches, "duplicate_of")
    return report


def incomplete_notes(matches: Matches) -> list[str]:
    """Return a line on rows of which a similar one may have been missed, if there are any."""
    if not matches.incomplete:
        return []
    return [
        f"{matches.incomplete} rows share much text with many others, with the most similar of "
        "which alone they were compared: of rows just above the threshold some may have been missed"
    ]


def write_without(
    target: Path,
    report_file: Path,
    report: dict[str, Any],
    rows: ComparedRows,
    numbers: range,
    matches: Matches,
    name: str,
) -> None:
    """Write those of some rows that are usable and have no match, and the report with the others.

    `name` is the key of the row that one left out matches.
    """
    with write_new(target) as first, write_new(report_file) as last:
        lost = (row for row in numbers if is_left_out(rows, row, matches))
        write_report(last, report, (rows.reported(row, matches, name) for row in lost))
        with first.open("wb") as file:
            kept = (row for row in numbers if not is_left_out(rows, row, matches))
            file.writelines(map(rows.line, kept))


def is_left_out(rows: ComparedRows, row: int, matches: Matches) -> bool:
    """Whether a row can't be used or has a match."""
    return not rows.is_usable(row) or bool(matches.other[row] >= 0)
