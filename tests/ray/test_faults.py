"""Whatever is killed, at a random moment: the trial ends as it would have, or says why it can't.

Once each in every run of the tests, and `pytest tests/ray --kills 5` takes five moments.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rayfin.config import ScalingConfig, load_config, with_values
from rayfin.data import load_corpus
from rayfin.history import History, TrialRecord
from rayfin.paths import Place
from rayfin.training import TrialResult, TrialSpec
from rayfin.training.strategies import Group
from rayfin.training.trial import run_trial
from rayfin.training.workers import WorkerGroup
from rayfin.tuning.cluster import nodes, worker_resources

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SECONDS = 120.0
"""The bound: so long after a trial lost a process it has ended."""


class Killer(threading.Thread):
    """Kills the first process of a name, so long after the trial's first report."""

    def __init__(self, lab: Any, name: str, delay: float) -> None:
        super().__init__(daemon=True)
        self.lab, self.name_of_victim, self.delay = lab, name, delay
        self.begun, self.over = threading.Event(), threading.Event()
        self.killed: tuple[int, float] | None = None
        """The process, and when."""

    def run(self) -> None:
        self.begun.wait()
        if self.over.wait(self.delay):
            return
        for victim in self.lab.processes(self.name_of_victim)[:1]:
            victim.kill()
            self.killed = victim.pid, time.monotonic()


def test_a_trial_whose_group_loses_a_process_ends_as_it_would_have(
    cluster: str, lab: Any, tmp_path: Path, kills: int
) -> None:
    # Some seconds of steps, with a checkpoint after each.
    settings = ("train.max_steps=40", "train.eval_steps=4", "train.save_steps=1")
    config = load_config(None, [*lab.settings, *settings])
    streamed = with_values(config, {"data.streaming": True})
    corpora = {each.data: load_corpus(each.data) for each in (config, streamed)}
    moments = random.Random(seed := time.time_ns())
    wholes = {
        each.data: run_trial(TrialSpec.of(each), lambda _: None, place=Place(tmp_path / name))
        for each, name in ((config, "whole"), (streamed, "streamed"))
    }
    each = worker_resources(ScalingConfig(num_workers=2), nodes())
    with WorkerGroup(Group(2), resources=each, corpora=corpora) as workers:
        for number, (victim, mine) in enumerate(
            [("RayTrainWorker", streamed), ("TrainController", config)] * kills
        ):
            killer = Killer(lab, victim, moments.uniform(0.0, 1.5))
            killer.start()
            seen: list[int] = []

            def report(result: TrialResult, seen: list[int] = seen, killer: Any = killer) -> None:
                seen.append(result.metrics["steps"])
                killer.begun.set()

            place = tmp_path / str(number)
            end = workers.train(TrialSpec.of(mine), report, place=Place(place), max_failures=2)
            ended = time.monotonic()
            killer.over.set()
            killer.join()
            told = f"{seed}: {victim} killed after {killer.delay:.2f} s; evaluated {seen}"
            print(told)
            assert end.status == "finished", (told, end.error)
            assert seen == sorted(seen), f"it started anew, and not from its checkpoint: {told}"
            assert killer.killed is not None, f"it ended first: {told}"
            assert ended - killer.killed[1] < SECONDS, told
            for point, other in zip(end.curve, wholes[mine.data].curve, strict=True):
                assert point == pytest.approx(other, abs=1e-4), told


def test_a_group_whose_driver_is_killed_and_interrupted_goes_on(
    lab: Any, moment: random.Random
) -> None:
    settings = ("data.streaming=true", "train.max_steps=200", "train.eval_steps=10")
    two = (*settings, "scaling.num_workers=2")
    killed = lab.rayfin("train", *two, "scaling.strategy=deepspeed-zero2")
    row = killed.amid(finished=0, step=moment.randrange(1, 100))
    killed.kill()
    marked = lab.mark(row)

    interrupted = lab.rayfin("train", *two)
    interrupted.until(lambda: lab.losses(lab.rows()[0])[:1] == [marked])
    assert interrupted.interrupt() == 130
    assert interrupted.err.endswith("rayfin: interrupted\n"), interrupted.err
    assert [row.status for row in lab.rows()] == ["interrupted"]

    # Alone: whoever goes on with it. That took a group in the runs before.
    assert lab.rayfin("train", *settings, "scaling.num_workers=1").end() == 0
    (row,) = lab.rows()
    assert row.status == "finished" and row.curve[-1]["step"] == 200
    assert lab.losses(row)[0] == marked, "it started anew, and not from its checkpoint"


def full(directory: Path) -> Callable[[], None]:
    """Fills the file system under `directory`; returns what frees it."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 4096):
            pass
    return filler.unlink


def rows_in(storage: Path) -> list[TrialRecord]:
    if not (storage / "history.sqlite").exists():
        return []
    with History.open(f"sqlite:///{storage / 'history.sqlite'}") as history:
        return history.trials()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB of its own."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "rayfin-test", place],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("a file system of its own needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_an_error_and_loses_no_finished_trial(
    lab: Any, small_disk: Path, moment: random.Random
) -> None:
    arguments = ("train.max_steps=4", "sweep.num_samples=4", f"storage={small_disk}")
    sweep = lab.script("sweep_qlora.py", *arguments)
    sweep.until(lambda: sum(row.status == "finished" for row in rows_in(small_disk)) >= 1)
    time.sleep(moment.uniform(0.0, 1.0))
    free = full(small_disk)
    code = sweep.end()
    finished = {row.trial_id for row in rows_in(small_disk) if row.status == "finished"}
    assert finished
    assert code == 2, sweep.err
    assert "No space left" in sweep.err or "disk is full" in sweep.err, sweep.err
    assert "Traceback" not in sweep.err
    assert not any(row.status == "failed" for row in rows_in(small_disk))
    free()
    again = lab.script("sweep_qlora.py", *arguments, "--resume")
    assert again.end() == 0, again.err
    rows = rows_in(small_disk)
    assert [row.status for row in rows] == ["finished"] * 4
    assert finished <= {row.trial_id for row in rows}
