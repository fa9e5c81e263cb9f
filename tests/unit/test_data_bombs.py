"""Data that is made, or happens, to be far larger than it looks: refused in little memory."""

import gzip
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rayfin.config.data import DataConfig
from rayfin.data import load_corpus
from rayfin.errors import DataError

MIB = 2**20
ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(4)]
LINES = [json.dumps(row).encode() + b"\n" for row in ROWS]


@contextmanager
def in_memory_of(most: int) -> Iterator[None]:
    """What is allocated within never comes to more than `most` bytes."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def with_long_line(path: Path, size: int, before: bytes, start: bytes = b"") -> Path:
    """Good rows around one line of `size` bytes, which takes no room on the disk."""
    with path.open("wb") as file:
        file.write(before + start)
        file.seek(size, 1)
        file.write(b"\n" + b"".join(LINES))
    return path


@pytest.mark.parametrize(
    ("before", "line"), [(LINES[0], 2), (b"\xef\xbb\xbf", 1)], ids=["second", "marked"]
)
def test_a_line_that_is_too_long_is_a_bad_row_and_never_held(
    tmp_path: Path, before: bytes, line: int
) -> None:
    path = with_long_line(tmp_path / "a.jsonl", 320 * MIB, before, b'{"text": "')
    with in_memory_of(256 * MIB), pytest.raises(DataError) as error:
        load_corpus(DataConfig(path=str(path)))
    assert f"{path}:{line}: longer than 64 MiB" in str(error.value)
    assert "\n" not in str(error.value)
    assert "put each object on a line of its own" in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_rows_after_a_line_that_is_too_long_are_used(tmp_path: Path, streaming: bool) -> None:
    path = with_long_line(tmp_path / "a.jsonl", 65 * MIB, b"")
    corpus = load_corpus(DataConfig(path=str(path), streaming=streaming, on_bad_row="skip"))
    assert [(bad.line, bad.rows) for bad in corpus.skipped] == [(1, 1)]
    assert "longer than 64 MiB" in corpus.skipped[0].reason
    assert len(corpus.train) + len(corpus.eval) == len(ROWS)


READER = """
import json, sys
from pathlib import Path
from rayfin.config.data import DataConfig
from rayfin.data import load_corpus
from rayfin.errors import DataError

def most_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

data = DataConfig(path=sys.argv[1], **json.loads(sys.argv[2]))
before = most_memory()
try:
    corpus = load_corpus(data)
    told = [f"{bad.line}: {bad.reason}" for bad in corpus.skipped]
    rows = len(corpus.train) + len(corpus.eval)
except DataError as error:
    told, rows = [str(error)], None
print(json.dumps([most_memory() - before, told, rows]))
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("settings", "rows"),
    [({}, None), ({"on_bad_row": "skip"}, 4), ({"on_bad_row": "skip", "streaming": True}, 4)],
    ids=["refused", "skipped", "streamed"],
)
def test_a_line_of_a_gigabyte_takes_little_memory(
    tmp_path: Path, settings: dict[str, object], rows: int | None
) -> None:
    path = with_long_line(tmp_path / "a.jsonl", 1024 * MIB, b"", b'{"text": "')
    assert path.stat().st_size > 2**30
    reader = [sys.executable, "-c", READER, str(path), json.dumps(settings)]
    done = subprocess.run(reader, capture_output=True, text=True, check=True)
    memory, told, used = json.loads(done.stdout)
    assert memory < 256 * MIB
    assert used == rows
    assert len(told) == 1 and "1: longer than 64 MiB" in told[0]


@pytest.mark.parametrize(
    ("name", "start", "piece"),
    [
        ("a.jsonl.gz", LINES[0], b" " * (2**16 - 1) + b"\n"),
        ("b.jsonl.gz", LINES[0], b"\0"),
        ("a.json.gz", b"[", b" "),
        ("a.csv.gz", b"prompt,completion\n", b"a,b\n"),
        ("utf16.jsonl.gz", "\ufeff".encode("utf-16-le"), b"a\0"),
    ],
)
def test_a_gz_bomb_is_refused(tmp_path: Path, name: str, start: bytes, piece: bytes) -> None:
    path = tmp_path / name
    with gzip.open(path, "wb") as file:
        file.write(start)
        for _ in range(72):
            file.write(piece * (MIB // len(piece)))
    with in_memory_of(300 * MIB), pytest.raises(DataError) as error:
        load_corpus(DataConfig(path=str(path)))
    assert f"'{path}' unpacks to more than 100 times its size" in str(error.value)
    assert "gunzip" in str(error.value) and "\n" not in str(error.value)
