"""Find the splits behind `data.path`: a file, a directory, or a data set of the hub."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayfin.config.data import DataConfig
from rayfin.data.folders import directory_splits
from rayfin.data.readers import allowed_names, is_readable, read_file
from rayfin.data.rows import Row
from rayfin.data.splits import ALL, Split, SplitSelection, select_splits
from rayfin.errors import DataError
from rayfin.hub import REMEDY, HubUnreachable, dataset_access

_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<split>[\w.-]+))?")


def find_splits(config: DataConfig) -> SplitSelection:
    """Return what to train and evaluate on, without reading any rows of files.

    Raises DataError where there is nothing to read, or where names leave the choice ambiguous.
    """
    path, wanted = config.path, config.split
    if path == "pydocs":
        _check_no_split(path, wanted)
        return SplitSelection(Split("", ""))
    local = _existing(path)
    hub = _HUB_ID.fullmatch(path)
    if local is None and hub is not None and not is_readable(Path(path)):
        if hub["split"] and wanted not in (None, hub["split"]):
            raise DataError(
                f"data.split: '{wanted}' and data.path: '{path}' name two splits; leave one out"
            )
        return _hub_sources(path, hub["name"], wanted or hub["split"])
    if local is None:
        raise DataError(
            f"data.path: '{path}' does not exist; give pydocs, a hub id (owner/name), "
            f"a directory, or a file ending in {allowed_names()}"
        )
    if not local.is_dir():
        return _one_file(path, local, wanted)
    splits, others, notes = directory_splits(local, together=wanted == ALL)
    if not splits and not others:
        raise DataError(
            f"data.path: directory '{path}' has no data file; give files ending in "
            f"{allowed_names()}"
        )
    chosen = select_splits(path, splits, others, wanted)
    return replace(chosen, extra_notes=tuple(notes))


def read_rows(split: Split, ignore: Collection[str] = ()) -> Iterator[Row]:
    """Yield all rows of a split in order; a row that can't be read holds the reason.

    The columns in `ignore` are not read where that saves work.
    """
    for file in split.files:
        yield from read_file(file, ignore)
    for name, rows in split.tables:
        for number, value in enumerate(rows, 1):
            yield Row(name, number, value)


def _one_file(path: str, file: Path, wanted: str | None) -> SplitSelection:
    if not is_readable(file):
        raise DataError(
            f"data.path: '{path}' has an unsupported extension '{file.suffix}'; "
            f"give a file ending in {allowed_names()}"
        )
    _check_no_split(path, wanted)
    return SplitSelection(Split("", "", (file,)))


def _check_no_split(path: str, wanted: str | None) -> None:
    if wanted not in (None, ALL):
        raise DataError(
            f"data.split: '{wanted}' can't be had of data.path='{path}', which has no splits, as "
            "directories and hub data sets do; leave data.split out"
        )


def _existing(path: str) -> Path | None:
    """Return the file or directory if there is one; a name that no file system takes is not."""
    try:
        local = Path(path).expanduser()
        return local if local.exists() else None
    except (OSError, RuntimeError):
        return None


def _hub_sources(path: str, name: str, wanted: str | None) -> SplitSelection:
    import datasets

    one = None if wanted == ALL else wanted
    try:
        with dataset_access(name):
            loaded: Any = datasets.load_dataset(name, split=one)
    except Exception as error:  # the hub's client raises dozens of unrelated kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "give an existing file or directory, or owner/name[:split]"
        if isinstance(error, HubUnreachable):
            remedy = REMEDY
        raise DataError(
            f"data.path: '{path}' is no local path, and as a hub data set it can't be loaded "
            f"({reason:.200}); {remedy}"
        ) from error
    if one is not None:
        return SplitSelection(_hub_split(name, one, loaded))
    splits = [_hub_split(name, str(split), table) for split, table in loaded.items()]
    return select_splits(path, splits, (), wanted)


def _hub_split(name: str, split: str, table: Any) -> Split:
    return Split(split, f"split {split}", tables=((f"{name}:{split}", table),))
