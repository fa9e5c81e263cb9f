"""Where things lie, and writing them whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from rayfin.errors import StorageError
from rayfin.objects import Objects, sums_of

METADATA = "rayfin.json"
"""The file beside an adapter that says what its weights don't."""


def cache_dir() -> Path:
    """`$RAYFIN_CACHE` or `~/.cache/rayfin`: converted models, and what else can be made again."""
    if configured := os.environ.get("RAYFIN_CACHE"):
        return Path(configured).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser().resolve() / "rayfin"


@dataclass(frozen=True)
class StoragePath:
    """A file or directory that all machines of a run share, and where it lies on this one.

    On a file system the two are the same. Of what is in an object store, `path` is this machine's
    copy: `fetch` makes it what the store holds, and `publish` the store what it is.
    """

    path: Path
    objects: Objects | None = None

    @classmethod
    def at(cls, location: str | Path) -> StoragePath:
        """Looks at the text alone; StorageError for a URL that no object store can have."""
        if "://" not in str(location):
            return cls(Path(location).expanduser().resolve())
        objects = Objects.at(str(location))
        scheme, _, path = objects.base.partition("://")
        # The options may name another server, of which a bucket of this name is another.
        server = f"{scheme}-{zlib.crc32(objects.options.encode()):08x}"
        return cls(cache_dir() / "objects" / server / path, objects)

    def __str__(self) -> str:
        return str(self.objects or self.path)

    def __truediv__(self, name: str) -> StoragePath:
        return StoragePath(self.path / name, self.objects / name if self.objects else None)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoragePath.at, (str(self),)  # another machine has its copies elsewhere

    def names(self) -> list[str]:
        """Of the directories in this one."""
        if self.objects is not None:
            return self.objects.names()
        found = self.path.iterdir() if self.path.is_dir() else ()
        return sorted(path.name for path in found if path.is_dir() and path.name[0] != ".")

    def publish(self) -> None:
        """Of a directory. Raises StorageError where the store can't be written."""
        if self.objects is not None:
            self.objects.put(self.path)

    def fetch(self) -> bool:
        """Of a directory; whether it is there."""
        if self.objects is None:
            return self.path.is_dir()
        sums = self.objects.sums()
        if sums is None:
            return False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Several workers on one machine ask at once.
        with FileLock(self.path.with_name(f".{self.path.name}.lock")):
            if self.path.is_dir() and sums_of(self.path) == sums:
                return True
            shutil.rmtree(self.path, ignore_errors=True)
            with suppress(_NotWhole), write_directory_whole(self.path) as temporary:
                if not self.objects.get(temporary, sums):
                    raise _NotWhole
        return self.path.is_dir()

    def exists(self) -> bool:
        """Whether a directory is here, whole."""
        return self.path.is_dir() if self.objects is None else self.objects.sums() is not None

    def publish_file(self) -> None:
        if self.objects is not None:
            self.objects.write(self.path.read_bytes())

    def fetch_file(self) -> bool:
        """Whether it is there."""
        if self.objects is not None:
            if (contents := self.objects.read()) is None:
                self.path.unlink(missing_ok=True)
            else:
                with write_whole(self.path) as temporary:
                    temporary.write_bytes(contents)
        return self.path.is_file()

    def remove_file(self) -> None:
        self.path.unlink(missing_ok=True)
        if self.objects is not None:
            self.objects.remove()

    @contextmanager
    def borrowed(self) -> Iterator[Path | None]:
        """A directory to read for the time of the block, from an object store a copy of its own.

        None where it is not there, or not whole.
        """
        if self.objects is None:
            yield self.path if self.path.is_dir() else None
            return
        sums = self.objects.sums()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=".read-") as own:
            there = sums is not None and self.objects.get(Path(own), sums)
            yield Path(own) if there else None

    def forget(self) -> None:
        """Removes the copy of a directory in an object store; never the only one there is."""
        if self.objects is not None:
            shutil.rmtree(self.path, ignore_errors=True)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self.objects is not None:
            self.objects.remove()


class _NotWhole(Exception):
    """What was read is not what was written."""


@dataclass(frozen=True)
class Storage:
    """Every path under one `storage`; nothing else in rayfin joins these names."""

    location: StoragePath

    @classmethod
    def at(cls, location: str | Path) -> Storage:
        """Makes and asks nothing."""
        return cls(StoragePath.at(location))

    @classmethod
    def open(cls, location: str | Path) -> Storage:
        """The storage at `location`, made if missing; StorageError where it can't be written."""
        opened = cls.at(location)
        here = opened.location
        if here.objects is not None:
            here.objects.check()
        try:
            here.path.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=here.path, prefix=".write-test-"):
                pass
        except OSError as error:
            remedy = (
                "give another place for copies of what is in a bucket, by RAYFIN_CACHE=DIR"
                if here.objects
                else "give a directory you may write to, storage=DIR"
            )
            raise StorageError(
                f"storage: '{here.path}' can't be written ({error.strerror or error}); {remedy}"
            ) from error
        return opened

    @property
    def history_url(self) -> str:
        if self.location.objects is not None:
            raise StorageError(
                f"storage: SQLite's file, the history, can't be in '{self.location}'; give "
                "history=postgresql+psycopg://HOST/DATABASE, or history=sqlite:////PATH on the "
                "machine that runs the command"
            )
        return f"sqlite:///{self.location.path / 'history.sqlite'}"

    @property
    def adapters(self) -> Path:
        if self.location.objects is not None:
            raise StorageError(
                f"storage: the registry of adapters can't be in '{self.location}'; give a "
                "directory, publish.storage=DIR to a run (or publish=null) and storage=DIR to "
                "rayfin serve"
            )
        return self.location.path / "adapters"

    @property
    def ray(self) -> Path:
        """Ray Tune's own files; nothing in rayfin reads them back."""
        return self.location.path / "ray"

    def sweep(self, sweep_id: str) -> StoragePath:
        return self.location / "sweeps" / sweep_id

    def trial(self, sweep_id: str, trial_id: str) -> StoragePath:
        return self.sweep(sweep_id) / "trials" / trial_id


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path`; on success it is renamed over `path`, else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    # Not mkstemp, whose file is private: the kernel applies the user's umask to this one.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def write_directory_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling directory, renamed to `path` on success; `path` must not exist.

    Where another process published `path` first, theirs stays and FileExistsError is raised.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(path)
        except OSError as error:
            if path.exists():
                raise FileExistsError(f"{path} exists") from error
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def left_unfinished(path: Path) -> list[Path]:
    """Returns what writers of `path` that were killed have left beside it."""
    name = re.compile(rf"\.{re.escape(path.name)}-[0-9a-f]{{8}}")
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    return [other for other in beside if name.fullmatch(other.name)]


def _temporary(path: Path) -> Path:
    """A new name beside `path`, of the same file system."""
    return path.with_name(f".{path.name}-{secrets.token_hex(4)}")


def write_text(path: Path, text: str) -> None:
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def digest_files(files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """File name -> {sha256 (hexadecimal), bytes}."""
    digests = {}
    for name, path in files.items():
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        digests[name] = {"sha256": sha256, "bytes": path.stat().st_size}
    return digests


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
