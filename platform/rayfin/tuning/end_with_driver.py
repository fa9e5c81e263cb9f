"""Ends processes when the one at the other end of standard input has ended; a program of its own.

Ray's servers end with the driver that started them, whatever kills it. The two agents of a node
then want to report that to a server that is gone too, and try for a minute. Arguments are
`PID:START`, so that no process which has been given the number since is taken for one of them.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path


def start_of(pid: int) -> str:
    """Returns when a process started, in the kernel's ticks since the machine did; or ''.

    Format: proc(5), field 22 of /proc/PID/stat; the second one, a name, may hold anything.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")
        return stat.rpartition(")")[2].split()[19]
    except OSError:
        return ""


def main() -> None:
    sys.stdin.read()
    for argument in sys.argv[1:]:
        pid, _, start = argument.partition(":")
        if start and start_of(int(pid)) == start:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


if __name__ == "__main__":
    main()
