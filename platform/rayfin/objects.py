"""Files in an object store (S3, Google Cloud Storage), through pyarrow's file systems.

An object store can't rename, so that a directory is whole there when a list of its files lies
beside it (`NAME.sums.json`: bytes and CRC-32 of each). The list is written last and removed first,
and what is downloaded is compared with it.
"""

from __future__ import annotations

import errno
import functools
import json
import secrets
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from rayfin.errors import StorageError
from rayfin.redaction import is_secret, redact_url

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

SCHEMES = ("s3", "gs")
_SUMS = ".sums.json"
_AWAY = "NETWORK_CONNECTION"
"""What AWS's client calls a server that it can't reach, after attempts of some seconds."""
_GS_PATIENCE = "retry_limit_seconds=30"
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

Checksums = dict[str, list[int]]
"""The bytes and the CRC-32 of each file of a directory, by its relative path."""


def checksums_of(directory: Path) -> Checksums:
    """Return the checksums of all files below a directory."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): checksum_of(path) for path in sorted(files)}


def checksum_of(path: Path) -> list[int]:
    """Return the bytes and the CRC-32 of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


@dataclass(frozen=True)
class ObjectPath:
    """A file or directory in an object store, at `s3://BUCKET/PATH` or `gs://BUCKET/PATH`.

    pyarrow's options may follow (`?region=…`, `?endpoint_override=…`). Credentials come from the
    machine or the environment, never from the URL, which is written into the history.
    """

    base: str
    options: str = ""

    @classmethod
    def at(cls, url: str) -> ObjectPath:
        """Parse a URL, without any access; raises StorageError for an unusable one."""
        given = redact_url(url)
        try:
            parts = urlsplit(url)
        except ValueError:  # which repeats the host, and what stands before it
            raise StorageError(
                f"storage: '{given}' is no URL, its host can't be read; "
                "give s3://BUCKET/PATH or gs://BUCKET/PATH"
            ) from None
        if parts.fragment or url.endswith("#"):
            raise StorageError(f"storage: '{given}' has a #, which no part of it may have")
        if parts.scheme not in SCHEMES:
            raise StorageError(
                f"storage: '{given}' is of no kind that rayfin writes to; "
                "give a directory, s3://BUCKET/PATH or gs://BUCKET/PATH"
            )
        if "@" in parts.netloc:
            raise StorageError(
                f"storage: credentials in a URL would be written into the history; give "
                f"{parts.scheme}://BUCKET/PATH, and the credentials in the environment"
            )
        if any(is_secret(name, value) for name, value in parse_qsl(parts.query)):
            raise StorageError(
                "storage: a key in a URL would be written into the history; leave it out, and give "
                "the credentials in the environment"
            )
        path = "/".join(part for part in parts.path.split("/") if part)
        if not parts.netloc or not path:
            raise StorageError(
                f"storage: '{given}' names no place in a bucket; give {parts.scheme}://BUCKET/PATH"
            )
        if {".", ".."} & set(path.split("/")):
            raise StorageError(f"storage: '{given}' has . or .. in its path; give it without")
        options = f"?{parts.query}" if parts.query else ""
        return cls(f"{parts.scheme}://{parts.netloc}/{path}", options)

    def __str__(self) -> str:
        return self.base + self.options

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(f"{self.base}/{name}", self.options)

    def check(self) -> None:
        """Raise StorageError where nothing can be written here."""
        with self._store("written") as store:
            probe = f"{self._path}/.write-test-{secrets.token_hex(4)}"
            with store.open_output_stream(probe):
                pass
            store.delete_file(probe)

    def read(self) -> bytes | None:
        """Return the contents of this file, or None where it does not exist."""
        with self._store("read") as store:
            try:
                return _contents(store, self._path)
            except FileNotFoundError:
                return None
            except OSError as error:
                if _AWAY in str(error):
                    raise
                # It may have been removed, or written anew, while it was read.
                with suppress(FileNotFoundError):
                    return _contents(store, self._path)
        return None

    def write(self, contents: bytes) -> None:
        """Write this file."""
        with self._store("written") as store:
            if self.base.startswith("gs:"):
                # There, pyarrow lists directories by objects that stand for them, made only so.
                store.create_dir(self._path.rpartition("/")[0], recursive=True)
            with store.open_output_stream(self._path) as file:
                file.write(contents)

    def names(self) -> list[str]:
        """Return the names of the directories directly in this one, whole or not, sorted."""
        from pyarrow.fs import FileSelector, FileType

        with self._store("read") as store:
            found = store.get_file_info(FileSelector(self._path, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == FileType.Directory)

    def modification_times(self) -> dict[str, float]:
        """Return when each file directly in this directory was written, by its name.

        The times are in seconds by the store's clock; some stores tell whole seconds only.
        """
        from pyarrow.fs import FileSelector, FileType

        with self._store("read") as store:
            found = store.get_file_info(FileSelector(self._path, allow_not_found=True))
        files = (info for info in found if info.type == FileType.File)
        return {info.base_name: (info.mtime_ns or 0) / 1e9 for info in files}

    def upload(self, directory: Path) -> None:
        """Upload a directory to here, replacing what is here.

        Until the upload ends, the directory here is not whole. Raises StorageError where it can't
        be written.
        """
        from pyarrow.fs import LocalFileSystem, copy_files

        checksums = checksums_of(directory)
        self.remove()
        with self._store("written") as store:
            copy_files(
                str(directory),
                self._path,
                source_filesystem=LocalFileSystem(),
                destination_filesystem=store,
            )
        self._list.write(json.dumps(checksums).encode())

    def checksums(self) -> Checksums | None:
        """Return the checksums of this directory's files, or None where it is not whole."""
        text = self._list.read()
        with suppress(ValueError, TypeError):
            return None if text is None else dict(json.loads(text))
        return None

    def is_whole(self) -> bool:
        """Whether this directory exists and is whole."""
        return self.checksums() is not None

    def download(self, directory: Path, checksums: Checksums) -> bool:
        """Copy the files here to `directory`, and return whether they have these checksums."""
        from pyarrow.fs import LocalFileSystem, copy_files

        with self._store("read") as store:
            try:
                copy_files(
                    self._path,
                    str(directory),
                    source_filesystem=store,
                    destination_filesystem=LocalFileSystem(),
                )
            except FileNotFoundError:
                return False
            except OSError:
                if self.checksums() != checksums:  # removed, or written anew, meanwhile
                    return False
                raise
        return checksums_of(directory) == checksums

    def remove(self) -> None:
        """Remove the file or directory here, if there is one."""
        from pyarrow.fs import FileType

        with self._store("written") as store:
            for path in (self._list._path, self._path):
                kind = store.get_file_info(path).type
                with suppress(FileNotFoundError):  # another has removed it
                    if kind == FileType.Directory:
                        store.delete_dir(path)
                    elif kind == FileType.File:
                        store.delete_file(path)

    def _patience(self) -> str:
        """Return the options, with a limit to the long retries of Google's client."""
        if not self.base.startswith("gs:") or "retry_limit_seconds" in self.options:
            return self.options
        return f"{self.options}&{_GS_PATIENCE}" if self.options else f"?{_GS_PATIENCE}"

    @property
    def _list(self) -> ObjectPath:
        return ObjectPath(self.base + _SUMS, self.options)

    @property
    def _path(self) -> str:
        return self.base.partition("://")[2]

    @contextmanager
    def _store(self, done: str) -> Iterator[FileSystem]:
        """Yield the store's file system; `done` is what an error says can't be done (`read`)."""
        from pyarrow import ArrowException

        scheme, _, path = self.base.partition("://")
        try:
            yield _file_system(f"{scheme}://{path.partition('/')[0]}{self._patience()}")
        except FileNotFoundError:
            raise
        except (OSError, ArrowException) as error:
            if getattr(error, "errno", None) in _LOCAL:  # this machine's disk, not the store
                raise
            said = " ".join(str(error).split())
            raise StorageError(
                f"storage: '{self}' can't be {done} ({said[:300]}); see that the bucket is there, "
                "that this machine reaches it, and that its role, or the credentials in the "
                "environment, may read and write it"
            ) from error


def _contents(store: FileSystem, path: str) -> bytes:
    with store.open_input_stream(path) as file:
        return bytes(file.read())


@functools.lru_cache(maxsize=16)
def _file_system(url: str) -> FileSystem:
    from pyarrow.fs import FileSystem

    store, _ = FileSystem.from_uri(url)
    return store
