"""Parquet, and other tables, as rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfin.data.columns import NAMED, USED
from rayfin.data.rows import Row
from rayfin.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_SOMETHING = "..."
"""Stands for a value that nobody asks for: of a column that is not used it matters only whether a
row has one."""


def row_groups(path: Path) -> int:
    """Returns a Parquet file's number of row groups.

    Raises DataError where it is no Parquet, or has a column twice.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(path)
        check_names(path, parquet.schema_arrow.names)
        return int(parquet.num_row_groups)
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"data.path: '{path}' is broken Parquet: {reason}") from error


def read_parquet(
    path: Path, ignore: Collection[str] = (), groups: Sequence[int] | None = None
) -> Iterator[Row]:
    """`groups`: of the file's row groups; all. The columns in `ignore` are not read."""

    def batches() -> Iterator[pa.RecordBatch]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        parquet = pq.ParquetFile(path)
        names = parquet.schema_arrow.names
        check_names(path, names)
        wanted = [name for name in names if name not in ignore]
        for batch in parquet.iter_batches(row_groups=groups, columns=wanted):
            nothing = pa.nulls(batch.num_rows)
            columns = [batch.column(n) if n in wanted else nothing for n in names]
            yield pa.RecordBatch.from_arrays(columns, names=names)

    yield from table_rows(path, "Parquet", batches(), ignore)


def check_names(path: Path, names: Sequence[str]) -> None:
    """Raises DataError where two columns have the same name: a row has a place for one of them."""
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(
            f"data.path: '{path}': the column '{twice[0]}' is there twice; rename one of them"
        )


def table_rows(
    path: Path, kind: str, batches: Iterable[pa.RecordBatch], ignore: Collection[str]
) -> Iterator[Row]:
    """Yields the rows of a table of some `kind`; the columns in `ignore` hold None.

    Values that nothing is made of are not made Python's: they may be large. Raises DataError where
    a column is there twice.
    """
    import pyarrow as pa

    number = 0
    try:
        for batch in batches:
            check_names(path, batch.schema.names)
            light = pa.RecordBatch.from_arrays(
                [_light(name, batch.column(name), ignore) for name in batch.schema.names],
                names=batch.schema.names,
            )
            for index in range(batch.num_rows):
                number += 1
                try:
                    yield Row(str(path), number, light.slice(index, 1).to_pylist()[0])
                except UnicodeDecodeError:
                    yield Row(str(path), number, problem="not UTF-8")
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        yield Row(str(path), number + 1, problem=f"broken {kind}: {reason}")


def _light(name: str, column: pa.Array, ignore: Collection[str]) -> pa.Array:
    """The column if its values matter; else whether a row has something in it."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if name in ignore:
        return pa.nulls(len(column))
    if name in USED or (name in NAMED and "binary" not in str(column.type)):
        return column
    has: Any = column.is_valid()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        has = pc.and_(has, pc.greater(pc.binary_length(column), 0))
    elif pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        has = pc.and_(has, pc.greater(pc.list_value_length(column), 0))
    return pc.if_else(has, _SOMETHING, None)
