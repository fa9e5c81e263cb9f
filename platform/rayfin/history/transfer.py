"""Export a history to JSONL or Parquet, and import these, CSV tables and PEFT's results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rayfin.errors import HistoryError, did_you_mean
from rayfin.history.csv_table import read_csv
from rayfin.history.peft_results import read_peft_result
from rayfin.history.record import TrialRecord, now
from rayfin.history.store import History
from rayfin.paths import write_whole

_JSON_COLUMNS = ("spec", "scenario", "metrics", "curve", "versions")
_TIME_COLUMNS = ("created_at", "updated_at")


@dataclass(frozen=True)
class ImportReport:
    """How many trials an import added, replaced, left unchanged and skipped."""

    added: int
    replaced: int
    unchanged: int
    skipped: list[str] = field(default_factory=list)
    """`file:line: reason` for each trial that could not be used."""


def export_history(history: History, path: str | Path, sweep_id: str | None = None) -> int:
    """Write all trials, or one sweep's, to a `.jsonl` or `.parquet` file, and return how many.

    The file appears whole or not at all. Raises HistoryError for another suffix, an unknown sweep,
    and a file that can't be written.
    """
    path = Path(path)
    writers = {".jsonl": _write_jsonl, ".parquet": _write_parquet}
    if path.suffix not in writers:
        raise HistoryError(f"export: '{path}' has no known ending; give a .jsonl or .parquet file")
    records = history.trials(sweep_id=sweep_id)
    if sweep_id is not None and not records:
        known = [summary.sweep_id for summary in history.sweeps()]
        raise HistoryError(
            f"sweep '{sweep_id}' is not in {history.shown_url}{did_you_mean(sweep_id, known)}; "
            "`rayfin history list --sweeps` shows all"
        )
    try:
        with write_whole(path) as temporary:
            writers[path.suffix](temporary, records)
    except OSError as error:
        raise HistoryError(
            f"export: '{path}' can't be written ({error.strerror or error}); give another path"
        ) from error
    return len(records)


def import_history(history: History, path: str | Path) -> ImportReport:
    """Add the trials in a file to the history, all in one transaction.

    `.jsonl` and `.parquet` are this module's own exports; `.csv` is a plain table (see
    `csv_table`); `.json`, or a directory of such files, is PEFT's method_comparison (see
    `peft_results`). What can't be used is skipped and reported. Raises HistoryError for a path
    that is none of these.
    """
    path = Path(path)
    try:
        found = list(_read(path))
    except OSError as error:
        raise HistoryError(
            f"import: '{path}' can't be read ({error.strerror or error}); give a file that exists"
        ) from error
    skipped = [item for item in found if isinstance(item, str)]
    # The same result imported again is dated anew, and perhaps from a file with another name.
    foreign = path.suffix in (".csv", ".json") or path.is_dir()
    counts = history.merge(
        (item for item in found if isinstance(item, TrialRecord)),
        ignoring=("created_at", "updated_at", "sweep_id") if foreign else (),
    )
    return ImportReport(counts.added, counts.replaced, counts.unchanged, skipped)


def _read(path: Path) -> Iterator[TrialRecord | str]:
    at = now()
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise HistoryError(f"import: '{path}' holds no .json file; give the path of a file")
        for file in files:
            yield from _read_peft(file, at)
        return
    match path.suffix:
        case ".jsonl":
            yield from _read_jsonl(path)
        case ".parquet":
            yield from _read_parquet(path)
        case ".csv":
            yield from read_csv(path, at)
        case ".json":
            yield from _read_peft(path, at)
        case _:
            raise HistoryError(
                f"import: '{path}' has no known ending; give a .jsonl, .parquet or .csv file, "
                "or .json results of PEFT's method_comparison, or a directory of them"
            )


def _read_peft(path: Path, at: datetime) -> Iterator[TrialRecord | str]:
    try:
        yield read_peft_result(path, at)
    except HistoryError as error:
        yield str(error)


def _write_jsonl(path: Path, records: list[TrialRecord]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record.model_dump(mode="json"), ensure_ascii=False) + "\n")


def _read_jsonl(path: Path) -> Iterator[TrialRecord | str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode("utf-8"))
                if not isinstance(values, dict):
                    raise HistoryError(f"is a {type(values).__name__}; each line is a JSON object")
                yield TrialRecord.parse(values)
            except (HistoryError, ValueError, RecursionError) as error:
                yield f"{path}:{number}: {error}"


def _write_parquet(path: Path, records: list[TrialRecord]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    time, text = pa.timestamp("us", tz="UTC"), pa.string()
    columns = TrialRecord.model_fields
    schema = pa.schema([(name, time if name in _TIME_COLUMNS else text) for name in columns])
    rows = [
        {k: _compact(v) if k in _JSON_COLUMNS else v for k, v in record.model_dump().items()}
        for record in records
    ]
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def _read_parquet(path: Path) -> Iterator[TrialRecord | str]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except pa.ArrowInvalid as error:
        first = str(error).partition("\n")[0]
        raise HistoryError(f"import: '{path}' is not a Parquet file ({first})") from None
    for number, row in enumerate(rows, start=1):
        try:
            decoded = {k: json.loads(v) if k in _JSON_COLUMNS else v for k, v in row.items()}
            yield TrialRecord.parse(decoded)
        except (HistoryError, ValueError, TypeError, RecursionError) as error:
            yield f"{path}:{number}: {error}"


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
