"""Heartbeats of threads, by which a thread that hangs is found, with its position in code."""

from __future__ import annotations

import ctypes
import faulthandler
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType

import psutil

from rayfin import watchdog
from rayfin.paths import cache_dir

_TICK_SECONDS = 5.0
_WINDOW_SECONDS = 60.0
_MOVED_BYTES = 2**20
"""The bytes that a process reads and writes in `_WINDOW_SECONDS` if it makes progress; one that
only waits does not, though a Ray worker moves some 40 kB by itself."""
_BYTES_A_SECOND = 10 * _MOVED_BYTES / _WINDOW_SECONDS
"""The bytes that a second of processor time counts as: computing for a tenth of a window is
progress. A process that waits for a disk or a network computes nothing."""

_TRIAL = "run_trial"
"""The function that a trial's thread runs."""


@dataclass
class _Beat:
    doing: str
    at: float
    moved: int | None
    """The process' work until then, by `_work_done`; None where work does not count as progress."""


_beats: dict[int, _Beat] = {}
"""The last beat of each thread, by its identifier; a thread that may wait indefinitely has none."""


def beat(doing: str, *, bulk: bool = False) -> None:
    """Record that the calling thread makes progress, and what it begins, such as "evaluating".

    Work in one long call, such as loading a model or tokenising, is `bulk`: it counts as progress
    as long as the process reads, writes or computes.
    """
    _beats[threading.get_ident()] = _Beat(doing, time.monotonic(), _work_done() if bulk else None)


def pause() -> None:
    """Record that the calling thread may wait for others until its next beat."""
    _beats.pop(threading.get_ident(), None)


@contextmanager
def busy(doing: str) -> Iterator[None]:
    """Record what the calling thread does in the block, outside which it may wait indefinitely."""
    beat(doing)
    try:
        yield
    finally:
        pause()


def seconds_silent(thread: int) -> tuple[float, str]:
    """Return the seconds since a thread's last beat, and what it then began.

    `thread` is its identifier. The time is 0 for a thread without a beat, or that waits for others.
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
    notice: str = "",
) -> Iterator[None]:
    """Watch the calling thread during the block.

    Where it has no beat for `seconds`, `on_hang` is called once, on another thread, with what the
    watched thread was doing and its position in code. Without `bulk`, bulk work may take any time,
    as it may wait for another process. Time in which the process is suspended does not count.

    A library that hangs while it holds Python's global lock stops all threads, the watching one
    included. With `trace`, another process then ends this one and leaves under that name what
    `hang_position` reads; it writes `notice` to standard error, with the position of the function
    `run_trial` in place of `watchdog.WHERE`. Only one thread of a process can be watched so.
    """
    thread, over = threading.get_ident(), threading.Event()
    beat("starting")
    guard = _Watchdog(trace, seconds, notice) if trace is not None else None
    watch = threading.Thread(
        target=_watch,
        args=(thread, seconds, on_hang, bulk, over, guard),
        name="watch",
        daemon=True,
    )
    watch.start()
    # A thread that waits for a disk takes no signal; the watching thread does.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {watchdog.SIGNAL} if guard else set())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        over.set()
        pause()
        if guard is not None:
            watch.join()
            guard.close()


def _tick(seconds: float) -> float:
    return min(_TICK_SECONDS, seconds / 10)


def _watch(
    thread: int,
    seconds: float,
    on_hang: Callable[[str], None],
    bulk: bool,
    over: threading.Event,
    guard: _Watchdog | None,
) -> None:
    tick = _tick(seconds)
    window = min(_WINDOW_SECONDS, seconds)
    enough = _MOVED_BYTES * window / _WINDOW_SECONDS
    last: _Beat | None = None
    # Counted in waits rather than by a clock, which goes on while the process is suspended.
    silent = looked = 0
    moved: int | None = None
    while not over.wait(tick):
        if guard is not None:
            guard.renew()
        now = _beats.get(thread)
        if now is None or now is not last:
            last, silent, looked = now, 0, 0
            moved = None if now is None else now.moved
        if last is None or not (bulk or last.moved is None):
            continue
        silent, looked = silent + 1, looked + 1
        if moved is not None and looked * tick >= window:
            until, looked = _work_done(), 0
            if until is not None:
                silent, moved = (0 if until - moved > enough else silent), until
        if silent * tick >= seconds:
            on_hang(f"{last.doing}: {thread_position(thread)}")
            return


class _Watchdog:
    """The watchdog process, which ends this one unless it is renewed in time."""

    def __init__(self, trace: str, seconds: float, notice: str) -> None:
        self._path = _trace_path(trace)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", encoding="utf-8")
        except OSError:  # the process is ended all the same, and nobody hears where it stood
            self._path = Path(os.devnull)
            self._file = self._path.open("w", encoding="utf-8")
        # In C, without Python's lock: it writes where the threads stand, and then the handler
        # before it, which is the C library's own `_exit`, ends the process. The signal's default
        # action would not end the first process of a container.
        _set_handler(ctypes.cast(ctypes.CDLL(None)._exit, ctypes.c_void_p))
        faulthandler.register(watchdog.SIGNAL, file=self._file, chain=True)
        tick = _tick(seconds)
        # Later than the watching thread would report.
        misses = math.ceil((1.5 * seconds + 1.0) / tick)
        arguments = (os.getpid(), tick, misses, self._path, _TRIAL, notice)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", watchdog.__file__, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            bufsize=0,
        )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin
        os.set_blocking(self._pipe.fileno(), False)

    def renew(self) -> None:
        # It may have been killed, and may be suspended while this process is not.
        with suppress(BrokenPipeError, BlockingIOError):
            self._pipe.write(b".")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe.close()
        faulthandler.unregister(watchdog.SIGNAL)
        _set_handler(None)
        self._file.close()
        if self._path != Path(os.devnull):
            self._path.unlink(missing_ok=True)


def _set_handler(function: ctypes.c_void_p | None) -> None:
    """Have the C library call `function` at the watchdog's signal; None is the default action.

    Python's own `signal.signal` takes no C function, and works on the main thread only.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    library.signal.restype = ctypes.c_void_p
    library.signal(watchdog.SIGNAL, function)


def _trace_path(trace: str) -> Path:
    # Not beside what the process writes, which may be what stalls.
    return cache_dir() / "hangs" / f"{trace}.txt"


def hang_position(trace: str, call: str = _TRIAL) -> str | None:
    """Return the position of the thread in the function `call` when its process was ended.

    Returns None where it was not ended, or ran on another machine. A position is returned once.
    """
    path = _trace_path(trace)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        path.unlink()  # another death has words of its own
    except OSError:
        return None
    return watchdog.position_in(text, call)


def thread_position(thread: int) -> str:
    """Return a thread's position in code, the innermost call first, without machine paths."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "its thread has ended"
    frames: list[FrameType] = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    # A foreign function matters where the thread is; further out it only calls.
    shown = [frames[0], *(each for each in frames[1:] if _module(each).startswith("rayfin."))]
    calls = (f"{each.f_code.co_name} ({_module(each)}:{each.f_lineno})" for each in shown)
    return " < ".join(islice(calls, watchdog.SHOWN_FRAMES))


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "?"))


def _work_done() -> int | None:
    """Return the bytes that this process has read and written, plus those its computing counts as.

    It is None where the system does not count reads and writes.
    """
    try:
        counters = psutil.Process().io_counters()
    except (AttributeError, psutil.Error, OSError):
        return None
    # What is read through a mapping is in `read_bytes` alone, what is cached in `read_chars` alone.
    names = ("read_bytes", "write_bytes", "read_chars", "write_chars")
    computed = int(time.process_time() * _BYTES_A_SECOND)
    return sum(getattr(counters, name, 0) for name in names) + computed
