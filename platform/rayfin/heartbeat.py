"""Whether a thread gets on: what it last said that it does, and what it is stuck in."""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from rayfin.paths import cache_dir

_MOVED_BYTES = 2**20
"""Bytes that a process which only waits does not read and write, and one that loads does."""

_SHOWN_FRAMES = 4
_CALL = re.compile(r'^  File "([^"]*)", line (\d+) in (.+)$', re.MULTILINE)
"""A line of what `faulthandler` writes: file, line and function."""


@dataclass
class _Beat:
    doing: str
    at: float
    moved: int | None
    """Bytes read and written by the process until then; None where these don't count."""


_beats: dict[int, _Beat] = {}
"""Thread's identifier -> what it last said; a thread that may wait for as long as it takes has no
entry."""


def beat(doing: str, *, bulk: bool = False) -> None:
    """Tells that the calling thread got on, and what it begins, such as "evaluating".

    What is done in one long call, such as loading a model, is `bulk`: as long as the process reads
    or writes, it gets on.
    """
    _beats[threading.get_ident()] = _Beat(doing, time.monotonic(), _moved() if bulk else None)


def pause() -> None:
    """Tells that the calling thread waits for others from here to its next beat."""
    _beats.pop(threading.get_ident(), None)


def silence(thread: int) -> tuple[float, str]:
    """Seconds since the last beat of the thread with that identifier, and what it said.

    A thread that has said nothing, or waits for others, is silent for 0 seconds.
    """
    found = _beats.get(thread)
    return (0.0, "") if found is None else (time.monotonic() - found.at, found.doing)


@contextmanager
def watched(
    seconds: float,
    on_hang: Callable[[str], None],
    *,
    bulk: bool = True,
    trace: str | None = None,
) -> Iterator[None]:
    """Watches the calling thread for the time of the block.

    Where it tells nothing for `seconds`, `on_hang` is called, once and on another thread, with what
    the watched one was doing and where it stands. Without `bulk`, what it does in bulk may take as
    long as it takes: it may wait for another process that does so.

    A library that is stuck while it holds Python's lock lets no other thread run, the watching one
    neither. With `trace` the process ends itself then, and leaves under that name what `last_words`
    reads. One thread of a process can be watched so.
    """
    thread, over = threading.get_ident(), threading.Event()
    beat("starting")
    resort = _LastResort(trace, seconds) if trace is not None else None
    watch = threading.Thread(
        target=_watch,
        args=(thread, seconds, on_hang, bulk, over, resort),
        name="watch",
        daemon=True,
    )
    watch.start()
    try:
        yield
    finally:
        over.set()
        pause()
        if resort is not None:
            watch.join()
            resort.close()


def _watch(
    thread: int,
    seconds: float,
    on_hang: Callable[[str], None],
    bulk: bool,
    over: threading.Event,
    resort: _LastResort | None,
) -> None:
    left = seconds
    while not over.wait(left):
        if resort is not None:
            resort.renew()
        last = _beats.get(thread)
        if last is None or not (bulk or last.moved is None):
            left = seconds
        elif (left := last.at + seconds - time.monotonic()) <= 0:
            moved = None if last.moved is None else _moved()
            if last.moved is None or moved is None or moved - last.moved <= _MOVED_BYTES:
                on_hang(f"{last.doing}: {whereabouts(thread)}")
                return
            last.at, last.moved, left = time.monotonic(), moved, seconds


class _LastResort:
    """Ends the process where it is not renewed in time, without any lock of Python's."""

    def __init__(self, trace: str, seconds: float) -> None:
        self._seconds, self._path = seconds, _trace_path(trace)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", encoding="utf-8")
        except OSError:  # the process ends itself all the same, and nobody hears where it stood
            self._path = Path(os.devnull)
            self._file = self._path.open("w", encoding="utf-8")
        self.renew()

    def renew(self) -> None:
        # After the watching thread would have had its say.
        after = 1.5 * self._seconds + 1.0
        faulthandler.dump_traceback_later(after, exit=True, file=self._file)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if self._path != Path(os.devnull):
            self._path.unlink(missing_ok=True)


def _trace_path(trace: str) -> Path:
    # Not beside what the process writes, which may be what stalls.
    return cache_dir() / "hangs" / f"{trace}.txt"


def last_words(trace: str, call: str) -> str | None:
    """Where the thread that was in the function `call` stood when its process ended itself.

    None where the process did not, or did so on another machine.
    """
    path = _trace_path(trace)
    try:
        threads = path.read_text(encoding="utf-8", errors="replace").split("\n\n")
        path.unlink()  # another death has words of its own
    except OSError:
        return None
    for thread in threads:
        calls = _CALL.findall(thread)
        if any(name == call for _, _, name in calls):
            shown = calls[:_SHOWN_FRAMES]
            return " < ".join(f"{name} ({Path(file).stem}:{line})" for file, line, name in shown)
    return None


def whereabouts(thread: int) -> str:
    """Where a thread stands, the innermost call first, without the machine's paths."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "its thread has ended"
    frames: list[FrameType] = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    # What is not ours is worth a word where the thread is; further out it only calls.
    shown = [frames[0], *(each for each in frames[1:] if _module(each).startswith("rayfin."))]
    return " < ".join(
        f"{each.f_code.co_name} ({_module(each)}:{each.f_lineno})" for each in shown[:_SHOWN_FRAMES]
    )


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "?"))


def _moved() -> int | None:
    """Bytes that this process has read and written; None where the system does not say."""
    try:
        counters = psutil.Process().io_counters()
    except (AttributeError, psutil.Error, OSError):
        return None
    # What is read through a mapping is in `read_bytes` alone, what is cached in `read_chars` alone.
    names = ("read_bytes", "write_bytes", "read_chars", "write_chars")
    return sum(getattr(counters, name, 0) for name in names)
