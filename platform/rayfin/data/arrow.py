"""Arrow files, as the datasets library saves its tables, as rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rayfin.data.rows import Row

_FILE_FORMAT = b"ARROW1"


def read_arrow(path: Path) -> Iterator[Row]:
    """Yields the rows of a file in Arrow's stream format or its file format."""
    import pyarrow as pa

    number = 0
    try:
        with pa.memory_map(str(path)) as source:
            for batch in _batches(source):
                for index in range(batch.num_rows):
                    number += 1
                    try:
                        yield Row(str(path), number, batch.slice(index, 1).to_pylist()[0])
                    except UnicodeDecodeError:
                        yield Row(str(path), number, problem="not UTF-8")
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        yield Row(str(path), number + 1, problem=f"broken Arrow: {reason}")


def _batches(source: Any) -> Iterator[Any]:
    import pyarrow as pa

    magic = source.read(len(_FILE_FORMAT))
    source.seek(0)
    if magic == _FILE_FORMAT:
        file = pa.ipc.open_file(source)
        yield from (file.get_batch(number) for number in range(file.num_record_batches))
    elif magic:
        yield from pa.ipc.open_stream(source)
