"""How a command ends: errors as one line on standard error, and its exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rayfin.cli.parser import print_error
from rayfin.errors import RayfinError, UsageError
from rayfin.library.process import prepare_process

INTERRUPTED = 130
"""The shell's exit code for Ctrl-C."""


@dataclass
class Ending:
    """The exit code of a command: 0, until the block or an error sets another."""

    code: int = 0


@contextmanager
def errors_as_lines() -> Iterator[Ending]:
    """Turn rayfin's errors and Ctrl-C in the block into a line on standard error and a code."""
    prepare_process()
    ending = Ending()
    try:
        yield ending
    except UsageError as error:
        print_error(error)
        ending.code = 2
    except RayfinError as error:
        print_error(error)
        ending.code = 1
    except KeyboardInterrupt:
        print_error("interrupted")
        ending.code = INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`rayfin history list | head`): not an error.
        sys.stdout = None
        ending.code = 0


def exit_code(code: int, received: Sequence[int]) -> int:
    """Return the code of a command that ended with `code` after it `received` signals."""
    return 128 + received[0] if received and code == INTERRUPTED else code
