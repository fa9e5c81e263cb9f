"""A small process that ends the one beside it, when that no longer says that it lives.

A library that is stuck while it holds Python's lock stops every thread of its process, so that only
another process can end it. The watched process writes a byte to this one's standard input every
so often. Bytes that are missing are counted in waits, not by a clock: a suspension (Ctrl-Z,
`docker pause`, a batch system's) lasts as long as it lasts, and counts as one wait at most.

It is run by its path, and imports as little as it can, so that a start costs milliseconds.
"""

import os
import re
import select
import signal
import sys
import time
from pathlib import Path

SIGNAL = getattr(signal, "SIGRTMAX", signal.SIGUSR2) - (1 if hasattr(signal, "SIGRTMAX") else 0)
"""Makes the watched process write where its threads stand, and end."""

WHERE = "{where}"
"""The part of the notice in whose place is put where the process stood."""

_WRITES_SECONDS = 5.0
SHOWN_FRAMES = 4
"""The most calls by which a place in the program is told."""
_CALL = re.compile(r'^  File "([^"]*)", line (\d+) in (.+)$', re.MULTILINE)
"""A line of what `faulthandler` writes: file, line and function."""


def position_in(trace: str, call: str) -> str | None:
    """Returns where the thread in the function `call` stood, from what `faulthandler` wrote.

    Returns None where no thread was in it.
    """
    for thread in trace.split("\n\n"):
        calls = _CALL.findall(thread)
        if any(name == call for _, _, name in calls):
            shown = calls[:SHOWN_FRAMES]
            return " < ".join(f"{name} ({Path(file).stem}:{line})" for file, line, name in shown)
    return None


def falls_silent(pid: int, source: int, tick: float, misses: int) -> bool:
    """Waits until `misses` waits of `tick` seconds brought no byte from `source`, and returns True.

    Returns False where the process `pid`, this one's parent, has ended before.
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
    """Has this process's parent `pid` write where it stands, and end; kills it if it does not."""
    os.kill(pid, SIGNAL)
    for _ in range(int(_WRITES_SECONDS / 0.05)):
        if os.getppid() != pid:
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)


def main(pid: int, tick: float, misses: int, path: str, call: str, notice: str) -> None:
    """Ends the process `pid` where it falls silent, and then writes `notice` to standard error.

    The process writes to `path` where its threads stand. The notice is about the thread in the
    function `call`.
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
