"""Write new files and directories whole, and remove what commands that were killed have left."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rayfin.errors import StorageError
from rayfin.paths import unfinished_writes, write_directory_whole, write_whole

ELSEWHERE = "give --output a place that you may write to and that has room"


def check_new(*paths: Path) -> None:
    """Raise StorageError where one of these files or directories exists."""
    for path in paths:
        if path.exists():
            kind = "directory" if path.is_dir() else "file"
            raise StorageError(f"'{path}' exists; give --output the name of a new {kind}")


@contextmanager
def write_errors(path: Path, remedy: str = ELSEWHERE) -> Iterator[None]:
    """Raise a StorageError for what the system raises where `path` can't be written."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"'{path}' can't be written ({error.strerror or error}); {remedy}"
        ) from error


@contextmanager
def write_new(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`, which becomes `path` on success and else is removed.

    Raises StorageError where `path` exists, before and after the block.
    """
    check_new(path)
    with write_errors(path):
        _remove_unfinished(path)
        with write_whole(path) as temporary, _locked(temporary):
            yield temporary
            check_new(path)


@contextmanager
def write_new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling directory, renamed to `path` on success.

    Raises StorageError where `path` exists, before and after the block.
    """
    check_new(path)
    with write_errors(path):
        _remove_unfinished(path)
        try:
            with write_directory_whole(path) as temporary, _locked(temporary):
                yield temporary
        except FileExistsError:
            check_new(path)
            raise


def _remove_unfinished(path: Path) -> None:
    """Remove what killed commands have left of `path`, but nothing that is still being written."""
    for left in unfinished_writes(path):
        with suppress(OSError), _locked(left) as locked:
            if locked:
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a file or directory, and yield whether that is so.

    The system releases it when the process ends, however that happens. Not every file system has
    locks; nothing is ever removed on one that has none.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
