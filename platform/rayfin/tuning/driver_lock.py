"""One driver at a time for a sweep or a trial: two would train it over each other."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from filelock import FileLock, Timeout

from rayfin.errors import ConfigError, StorageError
from rayfin.history.driver import has_ended, this_driver
from rayfin.objects import ObjectPath
from rayfin.paths import StoragePath, write_json

_RENEWED_EVERY = 20.0
_FORGOTTEN_AFTER = 60.0
"""A driver on another machine that was killed holds its sweep in a bucket for so many seconds."""


@contextmanager
def driver_lock(location: StoragePath, what: str, remedy: str) -> Iterator[None]:
    """Holds the sweep or trial at `location` for the time of the block.

    Raises ConfigError where another process holds it: `what` is running, in which process and since
    when, and the `remedy`.

    On this machine, and on a disk that several machines share, the kernel keeps the lock and takes
    it from a process that ends, however it ends. A bucket has no locks; see `_lock_in_bucket`.
    """
    driver = this_driver() | {"since": datetime.now(UTC).isoformat(sep=" ", timespec="seconds")}
    lock, note = FileLock(location.path / ".lock", timeout=0), location.path / ".driver.json"
    try:
        location.path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        holder: object = None
        with suppress(OSError, ValueError):  # it has not said so yet
            holder = json.loads(note.read_text(encoding="utf-8"))
        raise ConfigError(
            f"{what} is running in another process{_named(holder)}; {remedy}"
        ) from None
    except OSError as error:
        raise _unwritable(location, error) from error
    try:
        try:
            write_json(note, driver)
        except OSError as error:
            raise _unwritable(location, error) from error
        if location.objects is None:
            yield
        else:
            with _lock_in_bucket(location.objects / "drivers", driver, what, remedy):
                yield
    finally:
        with suppress(OSError):
            note.unlink(missing_ok=True)
        lock.release()


@contextmanager
def _lock_in_bucket(
    drivers: ObjectPath, driver: Mapping[str, Any], what: str, remedy: str
) -> Iterator[None]:
    """Keeps a file among those of all drivers, renews it, and gives way to any other that is fresh.

    Each writes before it looks, and object stores list what was written before: of two drivers that
    come at the same moment at least one sees the other, and at most one stays. How old a file is
    tells the store's own clock. A driver whose machine is cut off from the store for longer than
    `_FORGOTTEN_AFTER` can't renew its file, and another may begin meanwhile.
    """
    name, contents = f"{secrets.token_hex(8)}.json", json.dumps(driver).encode()
    own, left = drivers / name, threading.Event()

    def renew() -> None:
        while not left.wait(_RENEWED_EVERY):
            with suppress(StorageError):  # the trials find out, and say so
                own.write(contents)

    own.write(contents)
    try:
        written = drivers.modification_times()
        now = max(written.values(), default=0.0)
        for other, at in written.items():
            if other == name or (told := (drivers / other).read()) is None:  # it has just left
                continue
            holder = _parsed(told)
            age = now - at
            if age > _FORGOTTEN_AFTER or has_ended(holder):
                (drivers / other).remove()
                continue
            raise ConfigError(
                f"{what} is running in another process{_named(holder)}, which renewed its file in "
                f"'{drivers}' {max(0.0, age):.0f} s ago; {remedy}; if it was killed, the file "
                f"counts for nothing {_FORGOTTEN_AFTER:.0f} s later"
            )
        renewing = threading.Thread(target=renew, daemon=True)
        renewing.start()
        try:
            yield
        finally:
            left.set()
            renewing.join()
    finally:
        with suppress(StorageError):
            own.remove()


def _parsed(told: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        if isinstance(value := json.loads(told), dict):
            return value
    return {}


def _named(holder: object) -> str:
    """Return words that name the process that holds a lock; none where that can't be read."""
    if not isinstance(holder, dict) or not {"pid", "host", "since"} <= holder.keys():
        return ""
    return f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"


def _unwritable(location: StoragePath, error: OSError) -> StorageError:
    return StorageError(
        f"storage: '{location.path}' can't be written ({error.strerror}); free some room, or give "
        "another storage=DIR"
    )
