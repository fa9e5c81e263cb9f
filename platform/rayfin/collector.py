"""Pause Python's garbage collector while long-lived objects are created."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Turn off garbage collection during the block.

    Importing torch and building a model create millions of objects that all stay. Collecting again
    and again while their number grows took a fifth to a half of such a block's time.
    """
    paused = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if paused:
            gc.enable()
