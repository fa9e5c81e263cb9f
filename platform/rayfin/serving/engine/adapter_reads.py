"""Read adapters from a storage that may stall or go away, for either engine."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from rayfin.errors import AdapterError, RayfinError, Unavailable
from rayfin.serving.timed_executor import TimedExecutor

MOST_STUCK = 16
"""Adapters whose reading may hang before the engine is to be replaced: a thread for each."""

_THREADS = 2
# As the system says that a disk or a network is gone, or that this process has too much at work.
_AWAY = (
    *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ETIMEDOUT, errno.EHOSTDOWN),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
)


def adapter_reads(load_seconds: float) -> TimedExecutor:
    """Returns threads for reads of adapters, each of which may take `load_seconds`."""
    return TimedExecutor(
        "adapter-load", threads=_THREADS, seconds=load_seconds, most_stuck=MOST_STUCK
    )


@contextmanager
def reading(ref: str) -> Iterator[None]:
    """Turns any exception in the block, in which adapter `ref` is read, into an error of rayfin's.

    Raises Unavailable if the storage is away or memory runs out, even if the reader blamed the
    adapter for it, and AdapterError for every exception that isn't an error of rayfin's already.
    """
    try:
        yield
    except BaseException as error:
        cause = error.__cause__ if isinstance(error, AdapterError) else error
        why = "no memory is left" if isinstance(cause, MemoryError) else None
        if isinstance(cause, OSError) and cause.errno in _AWAY:
            why = cause.strerror
        if why is not None:
            raise Unavailable(
                f"adapter '{ref}' can't be read now ({why}); try again later"
            ) from error
        if isinstance(error, RayfinError):
            raise
        raise AdapterError(
            f"adapter '{ref}' can't be read ({type(error).__name__}: {error}); publish it again"
        ) from error
