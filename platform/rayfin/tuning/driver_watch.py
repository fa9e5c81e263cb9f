"""Ends a driver whose history or storage hangs: its trials would wait for it without an end."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rayfin.heartbeat import pause, watched

EXIT_CODE = 2
"""The exit code is that of a storage that can't be written."""

_LAST_WORDS_SECONDS = 10.0


@contextmanager
def watched_driver(minutes: float, say: Callable[[str], None], again: str) -> Iterator[None]:
    """Ends this process where the calling thread hangs for `minutes` in what it is `busy` with.

    A thread that waits for a disk or a database can only be ended with its process. `say` gets one
    line before, which ends with how to go on, `again`. What the process has started ends with it;
    trials go on from their checkpoints.
    """

    def hang(where: str) -> None:
        line = (
            f"storage: no answer for {minutes:g} minutes (scaling.hang_timeout_minutes) in "
            f"{where}; when the disk or the database answers, {again}"
        )
        # The terminal may hang, too.
        words = threading.Thread(target=say, args=(line,), daemon=True)
        words.start()
        words.join(_LAST_WORDS_SECONDS)
        os._exit(EXIT_CODE)

    with watched(minutes * 60, hang):
        pause()
        yield
