"""A driver, or the process between it and a group, whose disk or database answers no more."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayfin.errors import TrialHung
from rayfin.heartbeat import seconds_silent
from rayfin.paths import StoragePath
from rayfin.training import trial_queue, workers
from rayfin.tuning import driver_watch
from rayfin.tuning.driver_watch import watched_driver
from rayfin.tuning.plan import TRIAL, PlannedTrial
from rayfin.tuning.record import Recorder
from rayfin.tuning.rows import started
from rayfin.tuning.worker import GroupTrainable

PATIENCE = 540.0
SOON = 0.002
"""Minutes."""


def test_a_history_that_hangs_ends_the_driver_with_how_to_go_on(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    told: list[str] = []
    answers = threading.Event()

    def end(code: int) -> None:  # the process, which is the tests' own
        ended.append(code)
        answers.set()

    monkeypatch.setattr(driver_watch.os, "_exit", end)
    me = threading.get_ident()
    seen: list[str] = []
    history: Any = SimpleNamespace(put=lambda row: seen.append(seconds_silent(me)[1]))
    row = started(PlannedTrial("sweep-1-f", "f", {}, lab.spec(), StoragePath(tmp_path)))
    with watched_driver(SOON, told.append, "the same command with --resume goes on"):
        recorder = Recorder(history, lambda _: None)
        recorder.put(row)
        assert seen == ["recording trial sweep-1-f in the history"]
        assert seconds_silent(me) == (0.0, ""), "it waits for its trials, however long they take"
        history.put = lambda row: answers.wait(PATIENCE)
        recorder.put(row)
    assert ended == [2]
    (line,) = told
    assert line.startswith("storage: no answer for 0.002 minutes (scaling.hang_timeout_minutes) in")
    assert "recording trial sweep-1-f in the history: wait (threading:" in line
    assert line.endswith("answers, the same command with --resume goes on")


def test_the_process_between_says_what_it_is_stuck_in(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = tmp_path / "held.json"
    os.mkfifo(held)  # whoever reads it waits, as on a disk that stalls

    class Group:
        def train(self, *_: Any, location: StoragePath, **__: Any) -> None:
            workers._give_back(location / "held.json")

    trial: Any = GroupTrainable.__new__(GroupTrainable)
    trial._workers, trial._max_failures, trial._hang_minutes = Group(), 0, SOON
    planned = PlannedTrial("sweep-1-f", "f", {}, lab.spec(), StoragePath(tmp_path))
    trial._start({TRIAL: planned})
    hung = trial._results.get(timeout=PATIENCE)
    assert isinstance(hung, TrialHung)
    assert "in reading what the workers held: " in str(hung)
    assert "give_back (rayfin.training.workers:" in str(hung)
    with suppress(OSError):  # the thread of this test is not to wait for ever
        held.write_text("[]")
    trial._thread.join(PATIENCE)


def test_a_queue_whose_disk_stalls_hands_the_trial_out_all_the_same(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    waits: list[bool] = []
    monkeypatch.setattr(trial_queue, "_WRITE_SECONDS", 1.0, raising=False)
    monkeypatch.setattr(trial_queue, "write_json", lambda *_: waits.append(answers.wait(PATIENCE)))
    job = trial_queue.Job(0, lab.spec(), StoragePath(tmp_path))

    async def work() -> None:
        one = trial_queue.TrialQueue(1)
        await one.begin("ab")
        await one.give(job)
        assert await one.next_job(-1) is job
        answers.set()

    asyncio.run(work())
    assert waits == [True], "it waited for the disk"
