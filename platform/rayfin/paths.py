"""The paths under a storage, and writing files and directories whole."""

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
from rayfin.objects import ObjectPath, checksums_of

METADATA = "rayfin.json"
"""The file beside an adapter with what its weights don't say."""
TRAINING_STATE = "training_state.safetensors"
"""The file beside an adapter with what another training needs to continue the one that made it."""


def cache_dir() -> Path:
    """Return `$RAYFIN_CACHE` or `~/.cache/rayfin`, which holds only what can be made again."""
    if configured := os.environ.get("RAYFIN_CACHE"):
        return Path(configured).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser().resolve() / "rayfin"


@dataclass(frozen=True)
class StoragePath:
    """A file or directory that all machines of a run share, with its path on this machine.

    On a file system the two are the same. Of an object in a store, `path` is this machine's copy,
    which `download` and `upload` synchronise with the store.
    """

    path: Path
    objects: ObjectPath | None = None

    @classmethod
    def at(cls, location: str | Path) -> StoragePath:
        """Parse a path or URL, without any access; raises StorageError for an unusable URL."""
        if "://" not in str(location):
            return cls(Path(location).expanduser().resolve())
        objects = ObjectPath.at(str(location))
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
        """Return the names of the directories in this one, sorted."""
        if self.objects is not None:
            return self.objects.names()
        found = self.path.iterdir() if self.path.is_dir() else ()
        return sorted(path.name for path in found if path.is_dir() and path.name[0] != ".")

    def upload(self) -> None:
        """Upload this directory, replacing the one in the store.

        Raises StorageError where the store can't be written.
        """
        if self.objects is not None:
            self.objects.upload(self.path)

    def download(self) -> bool:
        """Download this directory, unless it is here already; return whether it exists."""
        if self.objects is None:
            return self.path.is_dir()
        checksums = self.objects.checksums()
        if checksums is None:
            return False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Several workers on one machine may ask at once.
        with FileLock(self.path.with_name(f".{self.path.name}.lock")):
            if self.path.is_dir() and checksums_of(self.path) == checksums:
                return True
            shutil.rmtree(self.path, ignore_errors=True)
            with suppress(_Incomplete), write_directory_whole(self.path) as temporary:
                if not self.objects.download(temporary, checksums):
                    raise _Incomplete
        return self.path.is_dir()

    def exists(self) -> bool:
        """Whether this directory exists and is whole."""
        return self.path.is_dir() if self.objects is None else self.objects.is_whole()

    def upload_file(self) -> None:
        """Upload this file, replacing the one in the store."""
        if self.objects is not None:
            self.objects.write(self.path.read_bytes())

    def download_file(self) -> bool:
        """Download this file, and return whether it exists."""
        if self.objects is not None:
            if (contents := self.objects.read()) is None:
                self.path.unlink(missing_ok=True)
            else:
                with write_whole(self.path) as temporary:
                    temporary.write_bytes(contents)
        return self.path.is_file()

    def remove_file(self) -> None:
        """Remove this file, here and in the store."""
        self.path.unlink(missing_ok=True)
        if self.objects is not None:
            self.objects.remove()

    @contextmanager
    def reading_copy(self) -> Iterator[Path | None]:
        """Yield this directory for reading, from an object store as a copy of the caller's own.

        Yields None where it does not exist or is not whole.
        """
        if self.objects is None:
            yield self.path if self.path.is_dir() else None
            return
        checksums = self.objects.checksums()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=".read-") as own:
            whole = checksums is not None and self.objects.download(Path(own), checksums)
            yield Path(own) if whole else None

    def remove_local_copy(self) -> None:
        """Remove this machine's copy of a directory that is in an object store."""
        if self.objects is not None:
            shutil.rmtree(self.path, ignore_errors=True)

    def remove(self) -> None:
        """Remove this directory, here and in the store."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self.objects is not None:
            self.objects.remove()


class _Incomplete(Exception):
    """The files downloaded are not those that were uploaded."""


@dataclass(frozen=True)
class Storage:
    """The paths under one `storage`, which nothing else in rayfin builds."""

    location: StoragePath

    @classmethod
    def at(cls, location: str | Path) -> Storage:
        """Return the storage at a path or URL, without any access."""
        return cls(StoragePath.at(location))

    @classmethod
    def open(cls, location: str | Path) -> Storage:
        """Return the storage at `location`, created if missing.

        Raises StorageError where it can't be written.
        """
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
        """The URL of the history that lies in this storage.

        Raises StorageError for an object store.
        """
        if self.location.objects is not None:
            raise StorageError(
                f"storage: SQLite's file, the history, can't be in '{self.location}'; give "
                "history=postgresql+psycopg://HOST/DATABASE, or history=sqlite:////PATH on the "
                "machine that runs the command"
            )
        return f"sqlite:///{self.location.path / 'history.sqlite'}"

    @property
    def adapters(self) -> Path:
        """The directory of the registry of adapters; raises StorageError for an object store."""
        if self.location.objects is not None:
            raise StorageError(
                f"storage: the registry of adapters can't be in '{self.location}'; give a "
                "directory, publish.storage=DIR to a run (or publish=null) and storage=DIR to "
                "rayfin serve"
            )
        return self.location.path / "adapters"

    @property
    def ray(self) -> Path:
        """The directory of Ray Tune's own files, which rayfin never reads back."""
        return self.location.path / "ray"

    def sweep(self, sweep_id: str) -> StoragePath:
        """Return the directory of a sweep."""
        return self.location / "sweeps" / sweep_id

    def trial(self, sweep_id: str, trial_id: str) -> StoragePath:
        """Return the directory of a trial."""
        return self.sweep(sweep_id) / "trials" / trial_id


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`, which replaces `path` on success and else is removed."""
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
    """Yield a temporary sibling directory, renamed to `path` on success; `path` must not exist.

    Where another process creates `path` first, that one stays and FileExistsError is raised.
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


def unfinished_writes(path: Path) -> list[Path]:
    """Return the temporary siblings of `path` that killed writers have left."""
    name = re.compile(rf"\.{re.escape(path.name)}-[0-9a-f]{{8}}")
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    return [other for other in beside if name.fullmatch(other.name)]


def _temporary(path: Path) -> Path:
    """Return a new path beside `path`, on the same file system."""
    return path.with_name(f".{path.name}-{secrets.token_hex(4)}")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, as UTF-8."""
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def digest_files(files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Return {sha256 (hexadecimal), bytes} of each file."""
    digests = {}
    for name, path in files.items():
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        digests[name] = {"sha256": sha256, "bytes": path.stat().st_size}
    return digests


def write_json(path: Path, value: Any) -> None:
    """Write a value whole as an indented JSON file with sorted keys."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
