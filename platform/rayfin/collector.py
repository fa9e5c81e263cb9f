"""Python's garbage collector, out of the way while what stays is being made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection inside the block.

    Importing torch and building a model make millions of objects that all stay. The collector walks
    over them again and again as they grow, which took a fifth to a half of such a block's time.
    """
    paused = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if paused:
            gc.enable()
