"""Files in an object store (S3, Google Cloud Storage), through pyarrow's file systems.

An object store can't rename, so what makes a directory whole there is a list of its files beside it
(`NAME.sums.json`: bytes and CRC-32 of each), which is written last and removed first. What is read
is compared with it.
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
"""AWS's client's word for a server that it can't reach, after attempts of some seconds."""
_GS_PATIENCE = "retry_limit_seconds=30"
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

Sums = dict[str, list[int]]
"""Path within a directory -> bytes and CRC-32 of the file."""


def sums_of(directory: Path) -> Sums:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): sum_of(path) for path in sorted(files)}


def sum_of(path: Path) -> list[int]:
    """Bytes and CRC-32."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


@dataclass(frozen=True)
class Objects:
    """What lies under one URL, `s3://BUCKET/PATH` or `gs://BUCKET/PATH`; a file or a directory.

    pyarrow's options may follow (`?region=…`, `?endpoint_override=…`). Credentials are those of the
    machine or of the environment, and never the URL's, which is written into the history.
    """

    base: str
    options: str = ""

    @classmethod
    def at(cls, url: str) -> Objects:
        """Raises StorageError for what is no URL of an object store; looks at the text alone."""
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

    def __truediv__(self, name: str) -> Objects:
        return Objects(f"{self.base}/{name}", self.options)

    def check(self) -> None:
        """Raises StorageError where nothing can be written here."""
        with self._store("written") as store:
            probe = f"{self._path}/.write-test-{secrets.token_hex(4)}"
            with store.open_output_stream(probe):
                pass
            store.delete_file(probe)

    def read(self) -> bytes | None:
        """A file's contents; None where there is none."""
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
        with self._store("written") as store:
            if self.base.startswith("gs:"):
                # There, pyarrow lists directories by objects that stand for them, made only so.
                store.create_dir(self._path.rpartition("/")[0], recursive=True)
            with store.open_output_stream(self._path) as file:
                file.write(contents)

    def names(self) -> list[str]:
        """Of the directories directly under this one, whole or not."""
        from pyarrow.fs import FileSelector, FileType

        with self._store("read") as store:
            found = store.get_file_info(FileSelector(self._path, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == FileType.Directory)

    def written(self) -> dict[str, float]:
        """Name of each file directly under this directory -> when it was written.

        In seconds by the store's clock, of which some stores tell whole ones only.
        """
        from pyarrow.fs import FileSelector, FileType

        with self._store("read") as store:
            found = store.get_file_info(FileSelector(self._path, allow_not_found=True))
        files = (info for info in found if info.type == FileType.File)
        return {info.base_name: (info.mtime_ns or 0) / 1e9 for info in files}

    def put(self, directory: Path) -> None:
        """Makes this directory what `directory` is; one that is killed leaves none that is whole.

        Raises StorageError where it can't be written.
        """
        from pyarrow.fs import LocalFileSystem, copy_files

        sums = sums_of(directory)
        self.remove()
        with self._store("written") as store:
            copy_files(
                str(directory),
                self._path,
                source_filesystem=LocalFileSystem(),
                destination_filesystem=store,
            )
        self._list.write(json.dumps(sums).encode())

    def sums(self) -> Sums | None:
        """Of its files; None where it is not whole."""
        text = self._list.read()
        with suppress(ValueError, TypeError):
            return None if text is None else dict(json.loads(text))
        return None

    def get(self, directory: Path, sums: Sums) -> bool:
        """Copies its files to `directory`; whether they are those of `sums`."""
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
                if self.sums() != sums:  # removed, or written anew, meanwhile
                    return False
                raise
        return sums_of(directory) == sums

    def remove(self) -> None:
        """Whatever is there, file or directory; nothing is no error."""
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
        """The options, with an end to Google's client's attempts, which go on for minutes."""
        if not self.base.startswith("gs:") or "retry_limit_seconds" in self.options:
            return self.options
        return f"{self.options}&{_GS_PATIENCE}" if self.options else f"?{_GS_PATIENCE}"

    @property
    def _list(self) -> Objects:
        return Objects(self.base + _SUMS, self.options)

    @property
    def _path(self) -> str:
        return self.base.partition("://")[2]

    @contextmanager
    def _store(self, done: str) -> Iterator[FileSystem]:
        """`done`: what could not be, where the store refuses."""
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
