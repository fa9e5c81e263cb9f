"""The most memory that a trial held at once, and giving it back."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Counts from its construction. GPU: allocated by tensors; CPU: resident in the process."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
        elif _CLEAR.exists():
            # Linux resets its high-water mark on writing 5 here (man 5 proc); a warm worker's next
            # trial must not be charged with the peak of the one before.
            with contextlib.suppress(PermissionError):  # some containers forbid it
                _CLEAR.write_text("5")

    def bytes(self) -> int:
        if self.device == "cuda":
            import torch

            return int(torch.cuda.max_memory_allocated())
        if _STATUS.exists():
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def release_memory() -> None:
    """Gives what ended trials held back to the system.

    A model and its trainer are in cycles, which stay until they are collected, and glibc keeps what
    was freed: a warm worker on CPU would grow by gigabytes from trial to trial.
    """
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library has none
        ctypes.CDLL(None).malloc_trim(0)
