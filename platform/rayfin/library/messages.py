"""Lines for the user on standard error, which Python code may switch off."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from rayfin.redaction import printable

log = logging.getLogger(__name__)

Say = Callable[[str], None]
"""Takes one line for the user."""


def progress_to(shown: bool) -> Say:
    """Return what takes the lines that say how far the work is: standard error, or nothing."""
    return _print if shown else _drop


def notes_to(shown: bool) -> Say:
    """Return what takes the lines that a user should know: standard error, or the log.

    Where progress is switched off they are warnings of Python's `logging`, as nothing that is told
    of somebody's data, or of why a training waits or ends, may be lost.
    """
    return _print if shown else log.warning


def _print(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


def _drop(line: str) -> None:
    pass
