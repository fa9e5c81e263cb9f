"""Find the rows to train on that stand among those to evaluate on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from rayfin.config import Config
from rayfin.data.sources import Source, find_sources, find_splits
from rayfin.data_tools.compared_rows import ComparedRows
from rayfin.data_tools.duplicates import incomplete_notes, is_left_out, write_without
from rayfin.data_tools.new_files import ELSEWHERE, write_errors
from rayfin.data_tools.reports import check_target, write_report
from rayfin.data_tools.row_files import MADE_BY, RowStream
from rayfin.errors import ConfigError, DataError, UsageError

_LEAKED = "evaluated"
"""The key of a report for the row evaluated on that a row to train on is equal or similar to."""
_MORE_ROOM = "set TMPDIR to a directory with room for the rows twice over, or give --output"


def find_leaks(
    config: Config,
    report_file: Path,
    target: Path | None = None,
    *,
    part: str | None = None,
    threshold: float | None = None,
    embedding_model: str | None = None,
) -> dict[str, Any]:
    """Compare each row to train on with those to evaluate on, and write the report.

    What is evaluated on is data.eval_path, or the data's own split for evaluation. Rows are leaks
    where they are equal, or where the Jaccard similarity of `part` of each is at least `threshold`
    (0.8), or with `embedding_model` the cosine similarity of its embeddings (0.95); without `part`
    it is the prompt, and of plain texts the whole. With `target`, the other rows to train on are
    written there as they are. Returns the report but for its list of the leaks.
    Raises UsageError where nothing is evaluated on, DataError for rows that can't be used unless
    data.on_bad_row=skip and where `target` would have no row, ConfigError for a threshold or part
    that can't be used, ModelError for such a model, and StorageError where a file exists.
    """
    if target is not None:
        check_target(target)
    train, evaluation, errors = _streams(config)
    if part is None:
        part = "whole" if "text" in (train.shape, evaluation.shape) else "prompt"
    by = part, threshold, embedding_model
    remedy = _MORE_ROOM if target is None else ELSEWHERE
    with write_errors(report_file, remedy), ComparedRows(report_file.parent, *by) as rows:
        with errors():
            rows.read(evaluation)
        held = len(rows)
        rows.read(train)
        numbers = np.arange(len(rows))
        leaks = rows.matches(numbers, held)
        turned = np.concatenate((numbers[held:], numbers[:held]))
        seen = rows.matches(turned, len(rows) - held)
        found, equal = int(np.count_nonzero(leaks.other >= 0)), int(np.count_nonzero(leaks.equal))
        rest = train.count - train.bad - found
        report = {
            MADE_BY: "rayfin data leaks",
            "path": config.data.path,
            "eval_path": config.data.eval_path or config.data.path,
            **rows.comparison(),
            "rows": train.count,
            "equal": equal,
            "similar": found - equal,
            "unusable": train.bad,
            "eval_rows": evaluation.count,
            "eval_unusable": evaluation.bad,
            "eval_rows_in_train": int(np.count_nonzero(seen.other >= 0)),
            "notes": [
                *dict.fromkeys([*evaluation.reading_notes(), *train.notes(("eval_path",))]),
                *rows.notes(),
                *incomplete_notes(leaks),
            ],
        }
        if target is None:
            lost = [row for row in range(held, len(rows)) if is_left_out(rows, row, leaks)]
            entries = (rows.reported(row, leaks, _LEAKED) for row in lost)
            write_report(report_file, report, entries)
        elif not rest:
            raise DataError(
                f"data.path: every row of '{config.data.path}' is in what is evaluated on, and "
                "none would be left to train on; look at them without --output"
            )
        else:
            report["written"] = rest
            write_without(target, report_file, report, rows, range(held, len(rows)), leaks, _LEAKED)
    return report


def _streams(
    config: Config,
) -> tuple[RowStream, RowStream, Callable[[], AbstractContextManager[None]]]:
    """Return the rows to train on, those to evaluate on, and what names the latter in errors."""
    data = config.data
    if data.sources:
        raise ConfigError("data.sources: this command reads data.path alone; leave it out")
    if data.eval_path is None:
        own = find_splits(data)
        if own.eval is None:
            raise UsageError(
                "nothing says what is evaluated on; give data.eval_path=FILE, or data that has a "
                "split for evaluation"
            )
        train = RowStream(config, replace(own, eval=None))
        evaluation = RowStream(config, replace(own, train=own.eval, eval=None, unread=()))
        return train, evaluation, nullcontext
    sources = find_sources(data)
    train = RowStream(config, replace(sources.train[0].selection, eval=None))
    held = cast("Source", sources.evaluation)
    with held.errors():
        changed = config.model_copy(update={"data": held.config})
        return train, RowStream(changed, held.selection), held.errors
