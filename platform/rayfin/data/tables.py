"""CSV, TSV and Parquet as rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rayfin.data.rows import Row, open_source
from rayfin.data.shapes import USED_COLUMNS
from rayfin.errors import DataError

_LARGEST_CELL = 2**27


def read_csv(path: Path) -> Iterator[Row]:
    return _read_separated(path, ",")


def read_tsv(path: Path) -> Iterator[Row]:
    return _read_separated(path, "\t")


def _read_separated(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), _LARGEST_CELL))
    # surrogateescape: a byte that is not UTF-8 spoils its own row, not the rest of the file.
    with (
        open_source(path) as raw,
        io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        if delimiter == ",":
            first = text.readline()
            text.seek(0)
            if ";" in first and "," not in first:  # what spreadsheets write in much of Europe
                delimiter = ";"
        yield from _parse_separated(str(path), csv.reader(text, delimiter=delimiter, strict=True))


def _parse_separated(file: str, reader: Any) -> Iterator[Row]:
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = "a quote is never closed" if "end of data" in str(error) else str(error)
            yield Row(file, line, problem=f"broken CSV: {reason}")
            if header is None:
                return
            continue
        if not any(cells):
            continue
        problem = _problem_of_cells(cells, header)
        if problem is not None:
            yield Row(file, line, problem=problem)
            if header is None:  # without a header no row after it means anything
                return
        elif header is None:
            header = [cell.strip() for cell in cells]
        else:
            yield Row(file, line, dict(zip(header, cells, strict=True)))


def _problem_of_cells(cells: list[str], header: list[str] | None) -> str | None:
    joined = "".join(cells)
    if "\0" in joined:
        return "holds a NUL character"
    try:
        joined.encode()
    except UnicodeEncodeError:
        return "not UTF-8"
    if header is not None and len(cells) != len(header):
        return f"has {len(cells)} cells where the header has {len(header)}"
    return None


def row_groups(path: Path) -> int:
    """Of a Parquet file; raises DataError where it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.ParquetFile(path).num_row_groups)
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"data.path: '{path}' is broken Parquet: {reason}") from error


def read_parquet(path: Path, groups: Sequence[int] | None = None) -> Iterator[Row]:
    """`groups`: of the file's row groups; all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        parquet = pq.ParquetFile(path)
        # Columns that no shape reads may be large (images); with none known, all are named in
        # the message that says what is missing.
        columns = [name for name in parquet.schema_arrow.names if name in USED_COLUMNS] or None
        for batch in parquet.iter_batches(row_groups=groups, columns=columns):
            for index in range(batch.num_rows):
                number += 1
                try:
                    yield Row(str(path), number, batch.slice(index, 1).to_pylist()[0])
                except UnicodeDecodeError:
                    yield Row(str(path), number, problem="not UTF-8")
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        yield Row(str(path), number + 1, problem=f"broken Parquet: {reason}")
