"""Read the rows of Parquet files, and of Arrow files as the datasets library saves them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfin.data.columns import NAMED, USED
from rayfin.data.row_settings import NO_SETTINGS, RowSettings
from rayfin.data.rows import Row
from rayfin.data.tool_calls import without_nulls_of_calls
from rayfin.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_FILE_FORMAT = b"ARROW1"
_CALLS = ("tools", "functions", "tool_calls", "function_call")
_SOMETHING = "..."
"""Stands for a value of a column that is not used: only whether there is one matters."""


def count_row_groups(path: Path) -> int:
    """Return the number of row groups of a Parquet file.

    Raises DataError for a broken file, or one that has a column twice.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(path)
        _check_column_names(path, parquet.schema_arrow.names)
        return int(parquet.num_row_groups)
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"data.path: '{path}' is broken Parquet: {reason}") from error


def read_parquet(
    path: Path, settings: RowSettings = NO_SETTINGS, groups: Sequence[int] | None = None
) -> Iterator[Row]:
    """Yield the rows of a Parquet file, or of these row `groups` of it.

    The columns that `settings` ignores are not read, unless it asks for whole rows.
    """

    def batches() -> Iterator[pa.RecordBatch]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        parquet = pq.ParquetFile(path)
        names = parquet.schema_arrow.names
        _check_column_names(path, names)
        wanted = [name for name in names if settings.whole or name not in settings.ignore]
        for batch in parquet.iter_batches(row_groups=groups, columns=wanted):
            nothing = pa.nulls(batch.num_rows)
            columns = [batch.column(n) if n in wanted else nothing for n in names]
            yield pa.RecordBatch.from_arrays(columns, names=names)

    yield from _table_rows(path, "Parquet", batches(), settings)


def read_arrow(path: Path, settings: RowSettings = NO_SETTINGS) -> Iterator[Row]:
    """Yield the rows of a file in Arrow's stream format or its file format.

    The columns that `settings` ignores hold None, unless it asks for whole rows.
    """

    def batches() -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        with pa.memory_map(str(path)) as source:
            magic = source.read(len(_FILE_FORMAT))
            source.seek(0)
            if magic == _FILE_FORMAT:
                file = pa.ipc.open_file(source)
                yield from (file.get_batch(number) for number in range(file.num_record_batches))
            elif magic:
                yield from pa.ipc.open_stream(source)

    yield from _table_rows(path, "Arrow", batches(), settings)


def _check_column_names(path: Path, names: Sequence[str]) -> None:
    """Raise DataError where two columns have the same name: a row can hold only one of them."""
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(
            f"data.path: '{path}': the column '{twice[0]}' is there twice; rename one of them"
        )


def _table_rows(
    path: Path, kind: str, batches: Iterable[pa.RecordBatch], settings: RowSettings
) -> Iterator[Row]:
    """Yield the rows of a table; the columns that `settings` ignores hold None.

    Unused values are not converted to Python objects, as they may be large, unless `settings` asks
    for whole rows. Raises DataError where a column is there twice.
    """
    import pyarrow as pa

    number = 0
    try:
        for batch in batches:
            _check_column_names(path, batch.schema.names)
            light = pa.RecordBatch.from_arrays(
                [_without_unused(n, batch.column(n), settings) for n in batch.schema.names],
                names=batch.schema.names,
            )
            calls = _has_calls(light.schema, settings)
            for index in range(batch.num_rows):
                number += 1
                try:
                    value = light.slice(index, 1).to_pylist()[0]
                    yield Row(
                        str(path),
                        number,
                        without_nulls_of_calls(value, settings) if calls else value,
                    )
                except UnicodeDecodeError:
                    yield Row(str(path), number, problem="not UTF-8")
                except (ValueError, OverflowError) as error:  # a date that Python has not, say
                    yield Row(str(path), number, problem=f"a value can't be read: {error}")
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        yield Row(str(path), number + 1, problem=f"broken {kind}: {reason}")


def _has_calls(schema: pa.Schema, settings: RowSettings) -> bool:
    """Whether a table has objects that describe tools or call them."""
    described = (
        f"{settings.column_of(field.name) or field.name} {field.type}".casefold()
        for field in schema
    )
    return any("struct" in each and any(name in each for name in _CALLS) for each in described)


def _without_unused(name: str, column: pa.Array, settings: RowSettings) -> pa.Array:
    """Return a column whose values are used as it is, and else only whether rows have a value."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if settings.whole:
        return column
    if name in settings.ignore:
        return pa.nulls(len(column))
    plain = (settings.column_of(name) or name).strip().casefold()
    if plain in USED or (plain in NAMED and "binary" not in str(column.type)):
        return column
    has: Any = column.is_valid()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        has = pc.and_(has, pc.greater(pc.binary_length(column), 0))
    elif pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        has = pc.and_(has, pc.greater(pc.list_value_length(column), 0))
    return pc.if_else(has, _SOMETHING, None)
