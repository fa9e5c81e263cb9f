"""What ends a command from outside, and that it ends in order then."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDS = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def ends_as_by_ctrl_c() -> Iterator[list[int]]:
    """SIGTERM, and SIGHUP of a terminal that is closed, do what Ctrl-C would do at that moment.

    Where SIGINT is ignored, as in what a script starts in the background, they raise
    KeyboardInterrupt. Yields the list of those that came. What is ignored stays so (nohup); only a
    process's main thread may set handlers, elsewhere nothing changes.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in _ENDS:
            # None: one that is not Python's, and could not be put back.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, interrupt)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
