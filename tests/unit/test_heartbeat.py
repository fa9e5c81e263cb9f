"""A thread that gets no further is noticed, and one that does is left alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rayfin import heartbeat
from rayfin.heartbeat import beat, last_words, pause, silence, watched, whereabouts

PATIENCE = 60.0
SECONDS = 0.3
"""What the watched threads of these tests may be silent for."""


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


def test_a_thread_that_gets_on_or_waits_for_others_is_left_alone() -> None:
    told: list[str] = []
    until = time.monotonic() + 4 * SECONDS
    with watched(SECONDS, told.append):
        while time.monotonic() < until:
            beat("training step")
            time.sleep(SECONDS / 10)
        pause()
        time.sleep(3 * SECONDS)
        assert silence(threading.get_ident()) == (0.0, "")
    assert told == []


def test_what_is_done_in_bulk_gets_on_while_the_process_reads_or_writes(tmp_path: Path) -> None:
    told: list[str] = []
    until = time.monotonic() + 4 * SECONDS
    with watched(SECONDS, told.append):
        beat("loading the base model", bulk=True)
        while time.monotonic() < until:
            (tmp_path / "part").write_bytes(b"\0" * 2 * heartbeat._MOVED_BYTES)
        assert told == []
        give_up = time.monotonic() + PATIENCE
        while not told and time.monotonic() < give_up:
            time.sleep(SECONDS / 10)
    assert told and told[0].startswith("loading the base model: ")


def test_a_thread_that_has_ended_is_nowhere() -> None:
    thread = in_thread(lambda: None)
    thread.join()
    assert whereabouts(thread.ident or 0) == "its thread has ended"


STUCK = """
import sys
from rayfin.heartbeat import beat, watched
from safetensors import safe_open

def run_trial():
    beat("loading the base model", bulk=True)
    with safe_open(sys.argv[1], framework="numpy"):  # it holds Python's lock while it waits
        pass

with watched(0.5, lambda where: None, trace="a-trial"):
    run_trial()
"""


def test_a_process_whose_lock_is_held_ends_itself_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYFIN_CACHE", str(tmp_path))
    assert last_words("a-trial", "run_trial") is None
    os.mkfifo(tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", STUCK, str(tmp_path / "model.safetensors")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=PATIENCE,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert last_words("a-trial", "run_trial") == "run_trial (<string>:8) < <module> (<string>:12)"
    assert last_words("another", "run_trial") is None
