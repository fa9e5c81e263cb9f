"""Arrow files, as the datasets library saves its tables, as rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rayfin.data.rows import Row
from rayfin.data.tables import table_rows

if TYPE_CHECKING:
    import pyarrow as pa

_FILE_FORMAT = b"ARROW1"


def read_arrow(path: Path, ignore: Collection[str] = ()) -> Iterator[Row]:
    """Yields the rows of a file in Arrow's stream format or its file format."""
    yield from table_rows(path, "Arrow", _batches(path), ignore)


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        magic = source.read(len(_FILE_FORMAT))
        source.seek(0)
        if magic == _FILE_FORMAT:
            file = pa.ipc.open_file(source)
            yield from (file.get_batch(number) for number in range(file.num_record_batches))
        elif magic:
            yield from pa.ipc.open_stream(source)
