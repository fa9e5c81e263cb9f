"""Reports on rows that are left out, written and read a row at a time: there may be many."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rayfin.data_tools.new_files import check_new, write_errors
from rayfin.data_tools.row_files import as_report, json_line
from rayfin.errors import ConfigError

_LIST = b', "left_out": [\n'


def report_beside(target: Path) -> Path:
    """Return the file of the report on `target`."""
    return target.with_suffix(".report.json")


def check_target(target: Path) -> Path:
    """Return the file of the report on `target`, and see to it that both can be written.

    Raises ConfigError for a name that is not one of JSON Lines, and StorageError where one exists.
    """
    if target.suffix.lower() != ".jsonl":
        raise ConfigError(f"--output: '{target}' is no JSON Lines; give a name that ends in .jsonl")
    report_file = report_beside(target)
    check_new(target, report_file)
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    return report_file


def write_report(path: Path, report: Mapping[str, Any], entries: Iterable[dict[str, Any]]) -> None:
    """Write a report as one JSON object whose last value, `left_out`, has a line for each entry."""
    with path.open("wb") as file:
        file.write(json_line(as_report(report)).removesuffix(b"}\n") + _LIST)
        for number, entry in enumerate(entries):
            file.write(b",\n" * bool(number) + json_line(entry).removesuffix(b"\n"))
        file.write(b"\n]}\n")


def reported_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a report that `write_report` wrote."""
    with path.open("rb") as file:
        next(file)
        for line in file:
            entry = line.rstrip().removesuffix(b",")
            if entry in (b"", b"]}"):
                return
            yield json.loads(entry)
