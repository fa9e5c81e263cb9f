"""A thread that gets no further is noticed, and one that does is left alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rayfin import heartbeat, watchdog
from rayfin.heartbeat import beat, hang_position, pause, seconds_silent, thread_position, watched

PATIENCE = 540.0
SECONDS = 0.3
"""What a thread that does hang may be silent for."""


def in_thread(run: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_a_thread_that_is_stuck_is_told_of_with_what_it_does_and_where() -> None:
    told: list[str] = []
    noticed = threading.Event()
    reading, writing = os.pipe()

    def hang(where: str) -> None:
        told.append(where)
        noticed.set()

    def stuck() -> None:
        with watched(SECONDS, hang):
            beat("reading the data")
            os.read(reading, 1)  # nobody writes

    thread = in_thread(stuck)
    assert noticed.wait(PATIENCE)
    assert re.fullmatch(r"reading the data: stuck \(\S*test_heartbeat:\d+\)", told[0])
    os.write(writing, b"x")
    thread.join(PATIENCE)
    os.close(reading)
    os.close(writing)
    assert len(told) == 1


class Waits(threading.Event):
    """What the watch waits with: no time passes, and before each wait something may happen."""

    def __init__(self, *happens: Callable[[], object]) -> None:
        super().__init__()
        self._happens = iter(happens)
        self.asked = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        self.asked += timeout or 0.0
        happens = next(self._happens, None)
        if happens is not None:
            happens()
        return happens is None


def watch(seconds: float, *happens: Callable[[], object]) -> list[str]:
    """What is told of this thread where the watch waits as often as something `happens`."""
    told: list[str] = []
    waits = Waits(*happens)
    try:
        heartbeat._watch(threading.get_ident(), seconds, told.append, True, waits, None)
    finally:
        pause()
    return told


def nothing() -> None:
    pass


def test_a_thread_that_gets_on_or_waits_for_others_is_left_alone() -> None:
    beat("training step")
    assert watch(60.0, *[lambda: beat("training step")] * 500) == []
    assert watch(60.0, pause, *[nothing] * 500) == []
    assert seconds_silent(threading.get_ident()) == (0.0, "")
    beat("training step")
    assert watch(60.0, *[nothing] * 500)[0].startswith("training step: ")


def test_a_suspended_process_is_not_taken_for_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])

    def suspended() -> None:
        now[0] += 50 * 60.0  # the clock goes on from SIGSTOP to SIGCONT

    beat("training step")
    assert watch(30 * 60.0, suspended, nothing, lambda: beat("training step"), suspended) == []


@pytest.mark.parametrize("minutes", [1.0, 30.0])
def test_what_is_done_in_bulk_gets_on_while_the_process_reads_or_writes(
    minutes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = [0]
    monkeypatch.setattr(heartbeat, "_work_done", lambda: moved[0])

    def moves(by: int) -> Callable[[], None]:
        return lambda: moved.__setitem__(0, moved[0] + by)

    beat("loading the base model", bulk=True)
    assert watch(minutes * 60, *[moves(2**20)] * 1000) == []
    # What a process of Ray's that only waits moves by itself, 65 kB in 100 s, is no loading.
    beat("loading the base model", bulk=True)
    told = watch(minutes * 60, *[moves(65_000)] * 1000)
    assert told and told[0].startswith("loading the base model: ")


def test_bytes_that_a_process_moves_are_counted(tmp_path: Path) -> None:
    before = heartbeat._work_done()
    (tmp_path / "part").write_bytes(b"\0" * 2**20)
    after = heartbeat._work_done()
    assert before is not None and after is not None and after - before >= 2**20


def test_what_computes_without_reading_gets_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenising much data takes hours of one call, in which nothing is read or written."""
    spent = [0.0]
    monkeypatch.setattr(heartbeat.time, "process_time", lambda: spent[0])
    counters = types.SimpleNamespace(read_bytes=0, write_bytes=0, read_chars=0, write_chars=0)
    monkeypatch.setattr(heartbeat.psutil.Process, "io_counters", lambda _: counters, raising=False)

    def computes(share: float) -> Callable[[], None]:
        return lambda: spent.__setitem__(0, spent[0] + share * heartbeat._TICK_SECONDS)

    beat("reading and tokenising the data", bulk=True)
    assert watch(30 * 60.0, *[computes(0.5)] * 1000) == []
    # A process of Ray's that only waits computes for less than a hundredth of the time.
    beat("reading and tokenising the data", bulk=True)
    assert watch(30 * 60.0, *[computes(0.01)] * 1000)


def test_a_thread_that_has_ended_is_nowhere() -> None:
    thread = in_thread(lambda: None)
    thread.join()
    assert thread_position(thread.ident or 0) == "its thread has ended"


WATCHED = """
import sys
from rayfin.heartbeat import beat, pause, watched

def run_trial():
    if sys.argv[2:]:
        from safetensors import safe_open
        beat("loading the base model", bulk=True)
        with safe_open(sys.argv[2], framework="numpy"):  # it holds Python's lock while it waits
            pass
    pause()
    print("waits", flush=True)
    sys.stdin.read()

with watched(0.5, lambda where: None, trace=sys.argv[1], notice="failed: hung in {where}"):
    run_trial()
"""


@contextmanager
def start(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive the block, also where it is suspended at its end."""
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE)


def test_a_process_whose_lock_is_held_is_ended_and_one_that_is_suspended_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYFIN_CACHE", str(tmp_path))
    assert hang_position("a-trial") is None
    os.mkfifo(tmp_path / "model.safetensors")
    with start("suspended") as healthy:
        assert healthy.stdout is not None
        assert healthy.stdout.readline() == "waits\n"
        healthy.send_signal(signal.SIGSTOP)
        with start("a-trial", tmp_path / "model.safetensors") as stuck:
            _, said = stuck.communicate(timeout=PATIENCE)  # as long as the other one's bound, too
        healthy.send_signal(signal.SIGCONT)
        _, errors = healthy.communicate(timeout=PATIENCE)
        assert (healthy.returncode, errors) == (0, "")
    assert stuck.returncode == watchdog.SIGNAL
    where = "run_trial (<string>:9) < <module> (<string>:16)"
    assert said == f"failed: hung in {where}\n"
    assert hang_position("a-trial") == where
    assert hang_position("another") is None


def test_whether_a_process_is_suspended_is_seen() -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert watchdog.suspended(process.pid)
        process.kill()
    assert not watchdog.suspended(os.getpid())
