"""Files and hub data sets as rows; a row that can't be read says why instead of stopping."""

from __future__ import annotations

import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rayfin.data.rows import Row, open_source
from rayfin.data.shapes import USED_COLUMNS
from rayfin.data.tables import read_csv, read_parquet, read_tsv
from rayfin.errors import DataError
from rayfin.hub import REMEDY, HubUnreachable, dataset_access

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<split>[\w.-]+))?")


def read_rows(path: str) -> Iterator[Row]:
    """All rows behind `data.path` in order; raises DataError where there is nothing to read."""
    hub = _HUB_ID.fullmatch(path)
    if hub is not None and _existing(path) is None and _reader_of(Path(path)) is None:
        yield from _read_hub(path, hub["name"], hub["split"] or "train")
        return
    for file in data_files(path):
        yield from _read_file(file)


def data_files(path: str) -> list[Path]:
    """The file, or those below the directory, in order; raises DataError where there is none."""
    local = _existing(path)
    if local is None:
        raise DataError(
            f"data.path: '{path}' does not exist; give pydocs, a hub id (owner/name), "
            f"a directory, or a file ending in {_allowed()}"
        )
    files = _files_below(local) if local.is_dir() else [local]
    if not files:
        raise DataError(
            f"data.path: directory '{path}' has no data file; give files ending in {_allowed()}"
        )
    if _reader_of(files[0]) is None:
        raise DataError(
            f"data.path: '{path}' has an unsupported extension '{local.suffix}'; "
            f"give a file ending in {_allowed()}"
        )
    return files


def _existing(path: str) -> Path | None:
    """The file or directory, if there is one: names that no file system takes are not there."""
    try:
        local = Path(path).expanduser()
        return local if local.exists() else None
    except (OSError, RuntimeError):
        return None


def _read_file(path: Path) -> Iterator[Row]:
    reader = _reader_of(path)
    assert reader is not None
    with reading(path):
        yield from reader(path)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the system says of a file that can't be read, as a DataError."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"data.path: '{path}' can't be read ({reason}); check that the file is whole "
            "and that you may read it"
        ) from error


def _files_below(directory: Path) -> list[Path]:
    found = []
    for folder, names, files in os.walk(directory):
        names[:] = [name for name in names if not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if _reader_of(path) is not None)


def _read_jsonl(path: Path) -> Iterator[Row]:
    with open_source(path) as lines:
        yield from parse_lines(str(path), lines)


def parse_lines(file: str, lines: Iterable[bytes], *, first: bool = True) -> Iterator[Row]:
    """JSON Lines as rows; `first`: they begin where the file does."""
    for number, line in enumerate(lines, 1):
        raw = line.removeprefix(_BYTE_ORDER_MARK) if first and number == 1 else line
        if raw.strip():
            yield _parsed(file, number, raw)


def _parsed(file: str, line: int, raw: bytes) -> Row:
    try:
        return Row(file, line, json.loads(raw.decode()))
    except UnicodeDecodeError as error:
        return Row(file, line, problem=f"not UTF-8 (byte {raw[error.start]:#04x})")
    except json.JSONDecodeError as error:
        return Row(file, line, problem=f"broken JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return Row(file, line, problem=f"JSON that can't be read: {error}")


def _read_json(path: Path) -> Iterator[Row]:
    """A list of objects, an object that has one list, or JSON Lines under the wrong name."""
    with open_source(path) as source:
        raw = source.read().removeprefix(_BYTE_ORDER_MARK)
    if not raw.strip():
        return
    try:
        whole = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield Row(str(path), line, problem=f"not UTF-8 (byte {raw[error.start]:#04x})")
        return
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from parse_lines(str(path), io.BytesIO(raw))
        else:
            problem = f"broken JSON: {error.msg} at column {error.colno}"
            yield Row(str(path), error.lineno, problem=problem)
        return
    except (ValueError, RecursionError) as error:
        yield Row(str(path), 1, problem=f"JSON that can't be read: {error}")
        return
    if isinstance(whole, dict):
        lists = [value for value in whole.values() if isinstance(value, list)]
        whole = lists[0] if len(lists) == 1 and not USED_COLUMNS & whole.keys() else [whole]
    if not isinstance(whole, list):
        yield Row(str(path), 1, problem="must be a list of objects, or an object that has one list")
        return
    for number, value in enumerate(whole, 1):
        yield Row(str(path), number, value)


def _read_hub(path: str, name: str, split: str) -> Iterator[Row]:
    import datasets

    try:
        with dataset_access(name):
            rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub's client raises dozens of unrelated kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "give an existing file or directory, or owner/name[:split]"
        if isinstance(error, HubUnreachable):
            remedy = REMEDY
        raise DataError(
            f"data.path: '{path}' is no local path, and as a hub data set it can't be loaded "
            f"({reason:.200}); {remedy}"
        ) from error
    for number, value in enumerate(rows, 1):
        yield Row(name, number, value)


_FORMATS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}


def _reader_of(path: Path) -> Callable[[Path], Iterator[Row]] | None:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        suffix = Path(path.stem).suffix.lower()
        return _FORMATS.get(suffix) if suffix != ".parquet" else None
    return _FORMATS.get(suffix)


def _allowed() -> str:
    return ", ".join(_FORMATS)
