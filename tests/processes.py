"""Ending the processes that a test started, and reading from them, within bounds.

pytest-timeout stops its clock when a test has failed, so that nothing ends a wait in a fixture's
teardown: whatever waits there needs a bound of its own.
"""

from __future__ import annotations

import os
import queue
import subprocess
import threading
import time
from contextlib import suppress

import psutil

BOUND = 540.0
"""Seconds within which a process that was killed is gone, or one that is asked has answered."""


def end_family(process: subprocess.Popen[str], bound: float = BOUND) -> None:
    """Kill a process with all its descendants, wait until they are gone, and close its pipes.

    The process may be a shell, or `nsenter`, which forks what it runs. Raises RuntimeError with the
    names of those that outlive it by `bound` seconds.
    """
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        new = [psutil.Process(process.pid)] if process.poll() is None else []
        while new:
            for one in new:
                with suppress(psutil.NoSuchProcess):
                    one.suspend()  # so that it starts nothing more meanwhile
            family += new
            new = [one for one in family[0].children(recursive=True) if one not in family]
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    wait_for_end(*family[1:], bound=bound)
    process.wait(bound)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with suppress(OSError):  # of a line that nobody reads any more
                pipe.close()


def wait_for_end(*processes: psutil.Process, bound: float = BOUND) -> None:
    """Wait until they have ended; raises RuntimeError for those that outlive `bound` seconds."""
    give_up = time.monotonic() + bound
    while left := [one for one in processes if runs(one)]:
        if time.monotonic() > give_up:
            raise RuntimeError(f"these still run after {bound:g} seconds: {left}")
        time.sleep(0.02)


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended; its parent may not have asked for how it did."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Lines:
    """The lines that a process writes to its standard output, each waited for within a bound."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self._command = process.args
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        # Its own: a file that a thread is reading can't be closed before the other side is.
        own = os.dup(process.stdout.fileno())
        threading.Thread(target=self._read, args=(own,), daemon=True).start()

    def next(self, bound: float = BOUND) -> str:
        """Return the next line; an empty one at the end of the output.

        Raises TimeoutError when none has come after `bound` seconds.
        """
        try:
            return self._lines.get(timeout=bound)
        except queue.Empty:
            message = f"{self._command} has written nothing for {bound:g} seconds"
            raise TimeoutError(message) from None

    def _read(self, own: int) -> None:
        with open(own, errors="replace") as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put("")
