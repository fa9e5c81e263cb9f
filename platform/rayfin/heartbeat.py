"""Heartbeats of threads: one that hangs is found, with what it was doing and where it stands."""

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
"""Bytes that a process which loads reads and writes in `_WINDOW_SECONDS`, and one that only waits
does not: a worker of Ray's moves some 40 kB by itself."""
_BYTES_A_SECOND = 10 * _MOVED_BYTES / _WINDOW_SECONDS
"""The bytes that a second of processor time counts as: a process that computes for a tenth of a
window does enough. One that waits for a disk or a network computes nothing."""

_TRIAL = "run_trial"
"""The function in which a trial's thread is."""


@dataclass
class _Beat:
    doing: str
    at: float
    moved: int | None
    """The process's work until then, as `_moved` counts it; None where that does not count."""


_beats: dict[int, _Beat] = {}
"""The last beat of each thread, by its identifier; a thread that may wait for as long as it takes
has none."""


def beat(doing: str, *, bulk: bool = False) -> None:
    """Records that the calling thread got on, and what it begins, such as "evaluating".

    What is done in one long call, such as loading a model or tokenising, is `bulk`: as long as the
    process reads, writes or computes, it gets on.
    """
    _beats[threading.get_ident()] = _Beat(doing, time.monotonic(), _moved() if bulk else None)


def pause() -> None:
    """Records that the calling thread waits for others from here to its next beat."""
    _beats.pop(threading.get_ident(), None)


@contextmanager
def busy(doing: str) -> Iterator[None]:
    """Tells what the calling thread does during the block, before and after which it may wait for
    others for as long as it takes.
    """
    beat(doing)
    try:
        yield
    finally:
        pause()


def silence(thread: int) -> tuple[float, str]:
    """Returns the seconds since a thread's last beat, and what it then began.

    `thread` is its identifier. One without a beat, or that waits for others, is silent for 0 s.
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
    """Watches the calling thread for the time of the block.

    Where it has no beat for `seconds`, `on_hang` is called, once and on another thread, with what
    the watched one was doing and where it stands. Without `bulk`, what it does in bulk may take as
    long as it takes: it may wait for another process that does so. Time in which the process is
    suspended does not count.

    A library that is stuck while it holds Python's lock lets no other thread run, the watching one
    neither. With `trace` another process ends this one then, and leaves under that name what
    `last_words` reads; it writes `notice` to standard error, with where the function `run_trial`
    stood in the place of `watchdog.WHERE`. One thread of a process can be watched so.
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
    # A thread that waits for a disk takes no signal; the watching one does.
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
    # Counted in waits, and not read from a clock: that goes on while the process is suspended.
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
            until, looked = _moved(), 0
            if until is not None:
                silent, moved = (0 if until - moved > enough else silent), until
        if silent * tick >= seconds:
            on_hang(f"{last.doing}: {whereabouts(thread)}")
            return


class _Watchdog:
    """The watchdog's process, which ends this one where it is not renewed in time."""

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
        # After the watching thread would have had its say.
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
    """Has the C library call `function` at the watchdog's signal; None is the default action.

    Python's own `signal.signal` takes no function of C, and works on the main thread alone.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    library.signal.restype = ctypes.c_void_p
    library.signal(watchdog.SIGNAL, function)


def _trace_path(trace: str) -> Path:
    # Not beside what the process writes, which may be what stalls.
    return cache_dir() / "hangs" / f"{trace}.txt"


def last_words(trace: str, call: str = _TRIAL) -> str | None:
    """Returns where the thread in the function `call` stood when its process was ended for it.

    Returns None where it was not ended, or on another machine.
    """
    path = _trace_path(trace)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        path.unlink()  # another death has words of its own
    except OSError:
        return None
    return watchdog.position_in(text, call)


def whereabouts(thread: int) -> str:
    """Returns where a thread stands, the innermost call first, without the machine's paths."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "its thread has ended"
    frames: list[FrameType] = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    # What is not ours is worth a word where the thread is; further out it only calls.
    shown = [frames[0], *(each for each in frames[1:] if _module(each).startswith("rayfin."))]
    calls = (f"{each.f_code.co_name} ({_module(each)}:{each.f_lineno})" for each in shown)
    return " < ".join(islice(calls, watchdog.SHOWN_FRAMES))


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "?"))


def _moved() -> int | None:
    """Returns the bytes that this process has read and written, and what its computing counts for.

    It is None where the system does not say what was read and written.
    """
    try:
        counters = psutil.Process().io_counters()
    except (AttributeError, psutil.Error, OSError):
        return None
    # What is read through a mapping is in `read_bytes` alone, what is cached in `read_chars` alone.
    names = ("read_bytes", "write_bytes", "read_chars", "write_chars")
    computed = int(time.process_time() * _BYTES_A_SECOND)
    return sum(getattr(counters, name, 0) for name in names) + computed
