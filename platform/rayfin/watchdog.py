"""A small process that ends its parent when that stops sending signs of life.

A library that hangs while it holds Python's global lock stops every thread of its process, so that
only another process can end it. The watched process regularly writes a byte to this one's standard
input. Missing bytes are counted in waits, not by a clock, so that a suspension (Ctrl-Z, `docker
pause`, a batch system) counts as one wait at most.

It is run by its path and imports little, so that it starts in milliseconds.
"""

import os
import re
import select
import signal
import sys
import time
from pathlib import Path

SIGNAL = getattr(signal, "SIGRTMAX", signal.SIGUSR2) - (1 if hasattr(signal, "SIGRTMAX") else 0)
"""The signal that makes the watched process write its threads' positions, and end."""

WHERE = "{where}"
"""The part of the notice that is replaced by the position of the process."""

_WRITES_SECONDS = 5.0
SHOWN_FRAMES = 4
"""The most calls that a position in code lists."""
_CALL = re.compile(r'^  File "([^"]*)", line (\d+) in (.+)$', re.MULTILINE)
"""A line of what `faulthandler` writes: file, line and function."""


def position_in(trace: str, call: str) -> str | None:
    """Return the position of the thread in the function `call`, from what `faulthandler` wrote.

    Returns None where no thread was in that function.
    """
    for thread in trace.split("\n\n"):
        calls = _CALL.findall(thread)
        if any(name == call for _, _, name in calls):
            shown = calls[:SHOWN_FRAMES]
            return " < ".join(f"{name} ({Path(file).stem}:{line})" for file, line, name in shown)
    return None


def falls_silent(pid: int, source: int, tick: float, misses: int) -> bool:
    """Return True once `misses` consecutive waits of `tick` seconds brought no byte from `source`.

    Returns False where the process `pid`, this one's parent, ends before that.
    """
    missed = 0
    while os.getppid() == pid:
        if select.select([source], [], [], tick)[0]:
            if not os.read(source, 4096):
                return False
            missed = 0
        elif not suspended(pid):
            missed += 1
            if missed >= misses:
                return True
    return False


def suspended(pid: int) -> bool:
    """Whether a process has been stopped by a signal; False where the system does not say."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2]
        return after_name.split()[0] in (b"T", b"t")
    except (OSError, IndexError):
        return False


def end(pid: int) -> None:
    """Make the parent process `pid` write its position and end; kill it if it does not."""
    os.kill(pid, SIGNAL)
    for _ in range(int(_WRITES_SECONDS / 0.05)):
        if os.getppid() != pid:
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)


def main(pid: int, tick: float, misses: int, path: str, call: str, notice: str) -> None:
    """End the process `pid` when it falls silent, and then write `notice` to standard error.

    That process writes its threads' positions to `path`. The notice has the position of the thread
    in the function `call`.
    """
    # What ends the watched process in order ends this one with it.
    for ordinary in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ordinary, signal.SIG_IGN)
    if not falls_silent(pid, sys.stdin.fileno(), tick, misses):
        return
    end(pid)
    if notice:
        where = position_in(Path(path).read_text(errors="replace"), call) or "an unknown place"
        print(notice.replace(WHERE, where), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:7])
