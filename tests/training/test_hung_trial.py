"""A trial that hangs, without a Ray: what Tune's worker does about it, and a single run."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from rayfin import heartbeat
from rayfin.config import Config
from rayfin.errors import TrialHung
from rayfin.heartbeat import beat, pause, seconds_silent, thread_position
from rayfin.history import History, TrialRecord
from rayfin.paths import Storage, StoragePath
from rayfin.training import trial as running
from rayfin.tuning import single, worker
from rayfin.tuning.plan import RESULT, TRIAL, PlannedTrial
from rayfin.tuning.rows import died, started
from rayfin.tuning.single import train_once

PATIENCE = 540.0


class OnCpu(worker.LocalTrainable):
    def setup(self, config: dict[str, Any], **_: Any) -> None:
        super().setup(config, hang_minutes=30.0, use_gpu=False)


class Watch:
    """In the place of `watched`: the bound has passed when the test says so."""

    thread = 0
    on_hang: Callable[[str], None]

    @contextmanager
    def watched(
        self, seconds: float, on_hang: Callable[[str], None], **_: object
    ) -> Iterator[None]:
        self.thread, self.on_hang = threading.get_ident(), on_hang
        beat("starting")
        yield
        pause()

    def bound_passes(self) -> None:
        _, doing = seconds_silent(self.thread)
        self.on_hang(f"{doing}: {thread_position(self.thread)}")


def until(holds: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < give_up
        time.sleep(0.01)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch()
    monkeypatch.setattr(worker, "watched", watch.watched)
    monkeypatch.setattr(worker, "_draining", lambda: False)
    return watch


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes of this process, which is the tests' own."""
    ended: list[int] = []
    monkeypatch.setattr(worker.os, "_exit", ended.append)
    return ended


def test_a_trial_that_is_stuck_reading_its_checkpoint_fails_and_takes_its_process_along(
    lab: Any, tmp_path: Path, watch: Watch, ended: list[int]
) -> None:
    torn = tmp_path / "trial" / "checkpoints" / "checkpoint-2"
    torn.mkdir(parents=True)
    os.mkfifo(torn / "sums.json")  # whoever reads it waits, as on a disk that stalls
    planned = PlannedTrial("s-f", "f", {}, lab.spec(), StoragePath(tmp_path / "trial"))
    trial = OnCpu({TRIAL: planned})
    writer = -1

    def is_read() -> bool:
        nonlocal writer
        with suppress(OSError):  # nobody reads it yet
            writer = os.open(torn / "sums.json", os.O_WRONLY | os.O_NONBLOCK)
        return writer >= 0

    until(is_read)
    watch.bound_passes()
    with pytest.raises(
        TrialHung, match=r"no progress for 30 minutes in reading the checkpoint: "
    ) as hung:
        trial.train()
    said = str(hung.value)
    assert "_damaged (rayfin.training.checkpoint:" in said
    # Tune ends the actor of a trial that raised: only the end of the process ends that thread.
    trial.stop()
    assert ended == [1]
    os.close(writer)  # else the thread of this test would wait for ever
    trial._thread.join(PATIENCE)
    assert str(pickle.loads(pickle.dumps(hung.value))) == said

    row = died(started(planned), f"ray.exceptions.RayTaskError\nrayfin.errors.TrialHung: {said}")
    assert (row.status, row.error) == ("failed", said)


def test_a_trial_that_hangs_while_it_is_stopped_is_named_by_the_next_one(
    lab: Any, tmp_path: Path, watch: Watch, ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    mended = threading.Event()

    def stalls(checkpoints: StoragePath) -> None:
        passing = threading.Thread(target=watch.bound_passes)
        passing.start()
        mended.wait(PATIENCE)

    monkeypatch.setattr(running, "clear_checkpoints", stalls)
    first, second = (
        PlannedTrial(name, name, {}, lab.spec(), StoragePath(tmp_path / name))
        for name in ("s-a", "s-b")
    )
    trial = OnCpu({TRIAL: first})
    assert trial.train()[RESULT].status == "running"
    until(lambda: watch.thread not in heartbeat._beats)  # the sweep's word may take its time
    config = {TRIAL: second}
    reset = threading.Thread(target=trial.reset_config, args=(config,), daemon=True)
    reset.start()
    reset.join(PATIENCE)
    assert not reset.is_alive()
    with pytest.raises(
        TrialHung, match=r"its process hung as trial s-a was ended: no progress for 30"
    ):
        trial.train()
    trial.stop()
    assert ended == [1]
    mended.set()
    trial._thread.join(PATIENCE)


def test_what_is_told_of_an_evaluation_is_watched(lab: Any) -> None:
    """The history's disk may stall: only who waits for an answer may take as long as it takes."""
    said: list[str] = []
    lab.run(lab.spec(), report=lambda _: said.append(seconds_silent(threading.get_ident())[1]))
    assert said == ["recording an evaluation"]


def single_run(lab: Any, directory: Path) -> tuple[Config, Storage]:
    spec = lab.spec()
    parts = {part: getattr(spec, part) for part in ("model", "data", "method", "train")}
    return Config(**parts, storage=str(directory)), Storage.at(directory)


def test_what_a_single_run_writes_to_the_history_is_watched_and_what_it_shows_is_not(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, storage = single_run(lab, tmp_path)
    said: list[str] = []
    put = History.put

    def doing(*_: object) -> None:
        said.append(seconds_silent(threading.get_ident())[1])

    def noted(history: History, row: TrialRecord) -> None:
        doing()
        put(history, row)

    monkeypatch.setattr(History, "put", noted)
    pause()  # an earlier trial of this thread was not watched
    with History.open(storage.history_url) as history:
        train_once(config, history=history, storage=storage, show=doing)
    # At its start, then what the evaluation in the middle shows, and its end.
    assert [each for each in said if each] == ["recording an evaluation", "recording the result"]
    assert said[said.index("recording an evaluation") + 1] == ""


def test_a_single_run_that_hangs_says_so_though_the_history_hangs_too(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(BaseException):
        pass

    config, storage = single_run(lab, tmp_path)
    mended, shown = threading.Event(), []
    options: dict[str, Any] = {}

    def ends(code: int) -> None:
        raise Ended(code)

    @contextmanager
    def hangs(seconds: float, on_hang: Callable[[str], None], **given: Any) -> Iterator[None]:
        options.update(given)
        monkeypatch.setattr(History, "put", lambda *_: mended.wait())
        on_hang("recording the result: put (sqlite)")
        yield

    monkeypatch.setattr(single, "watched", hangs)
    monkeypatch.setattr(single.os, "_exit", ends)
    monkeypatch.setattr(single, "_LAST_WORDS_SECONDS", 0.1)
    with History.open(storage.history_url) as history, pytest.raises(Ended):
        train_once(config, history=history, storage=storage, show=shown.append)
    mended.set()
    assert shown[-1].startswith("failed: no progress for 30 minutes in recording the result: put")
    assert options["notice"].startswith("failed: no progress, and its process hung in {where}; ")
