"""Whatever is killed, at a random moment: the trial ends as it would have, or says why it can't.

Once each in every run of the tests; `pytest tests/ray/test_faults.py --kills 5` takes five moments.
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

from rayfin.config import Config, ScalingConfig, load_config, with_values
from rayfin.data import load_corpus
from rayfin.history import History, TrialRecord
from rayfin.training import TrialResult, TrialSpec
from rayfin.training.strategies import Group
from rayfin.training.trial import run_trial
from rayfin.training.workers import WorkerGroup
from rayfin.tuning.cluster import nodes, worker_resources

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SECONDS = 150.0
"""The bound: within it a trial that lost a process has ended."""


@pytest.fixture
def config(lab: Any) -> Config:
    """Some seconds of steps, with a checkpoint after each."""
    settings = ("train.max_steps=40", "train.eval_steps=4", "train.save_steps=1")
    return load_config(None, [*lab.settings, *settings])


class Killer(threading.Thread):
    """Kills the first process of a name, so long after the trial's first report."""

    def __init__(self, lab: Any, name: str, delay: float) -> None:
        super().__init__(daemon=True)
        self.lab = lab
        self.name_of_victim, self.delay = name, delay
        self.begun, self.over = threading.Event(), threading.Event()
        self.killed: int | None = None

    def run(self) -> None:
        self.begun.wait(SECONDS)
        if self.over.wait(self.delay):
            return
        for victim in self.lab.processes(self.name_of_victim)[:1]:
            victim.kill()
            self.killed = victim.pid


@pytest.mark.parametrize(
    ("victim", "streaming"), [("RayTrainWorker", True), ("TrainController", False)]
)
def test_a_group_that_lost_a_process_ends_as_it_would_have(
    cluster: str, lab: Any, config: Config, tmp_path: Path, kills: int, victim: str, streaming: bool
) -> None:
    config = with_values(config, {"data.streaming": streaming})
    whole = run_trial(TrialSpec.of(config), lambda _: None, directory=tmp_path / "whole")
    moments = random.Random(f"{victim} {time.time_ns()}")
    each = worker_resources(ScalingConfig(num_workers=2), nodes())
    corpora = {config.data: load_corpus(config.data)}
    with WorkerGroup(Group(2), resources=each, corpora=corpora) as workers:
        for number in range(kills):
            killer = Killer(lab, victim, moments.uniform(0.0, 1.5))
            killer.start()
            seen: list[int] = []

            def report(result: TrialResult, seen: list[int] = seen, killer: Any = killer) -> None:
                seen.append(result.metrics["steps"])
                killer.begun.set()

            began = time.monotonic()
            place = tmp_path / str(number)
            end = workers.train(TrialSpec.of(config), report, directory=place, max_failures=2)
            killer.over.set()
            told = f"killed {killer.killed} after {killer.delay:.2f} s; evaluated {seen}"
            print(told)
            assert end.status == "finished", (told, end.error)
            assert time.monotonic() - began < SECONDS
            for mine, other in zip(end.curve, whole.curve, strict=True):
                assert mine == pytest.approx(other, abs=1e-4), told


def test_a_group_whose_driver_is_interrupted_and_killed_goes_on(lab: Any) -> None:
    settings = (
        "scaling.num_workers=2",
        "data.streaming=true",
        "train.max_steps=300",
        "train.eval_steps=20",
    )
    interrupted = lab.rayfin("train", *settings, "scaling.strategy=deepspeed-zero2")
    interrupted.until(lambda: any(lab.checkpoints(row) for row in lab.rows()))
    assert interrupted.interrupt() == 130
    assert interrupted.err.endswith("rayfin: interrupted\n"), interrupted.err
    (row,) = lab.rows()
    marked = lab.mark(row)

    killed = lab.rayfin("train", *settings)
    killed.until(lambda: lab.losses(lab.rows()[0])[:1] == [marked])
    killed.kill()

    # Alone: whoever goes on with it. That took a group in the run before.
    assert lab.rayfin("train", *settings, "scaling.num_workers=1").end() == 0
    (row,) = lab.rows()
    assert row.status == "finished" and row.curve[-1]["step"] == 300
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


def test_a_full_disk_is_an_error_and_loses_no_finished_trial(lab: Any, small_disk: Path) -> None:
    arguments = ("train.max_steps=4", "sweep.num_samples=4", f"storage={small_disk}")
    sweep = lab.script("sweep_qlora.py", *arguments)
    sweep.until(lambda: sum(row.status == "finished" for row in rows_in(small_disk)) >= 1)
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
