"""Whatever is killed, at a random moment: the trial ends as it would have, or says why it can't.

Once each in every run of the tests, and `pytest tests/ray --kills 5` takes five moments.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rayfin.config import load_config
from rayfin.paths import StoragePath
from rayfin.training import TrialSpec
from rayfin.training.trial import run_trial

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_group_that_is_interrupted_goes_on_alone(
    lab: Any, cluster: str, moment: random.Random, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (*lab.settings, "train.max_steps=120", "train.eval_steps=4")

    def interrupt(command: Any) -> None:
        command.until(lambda: saved(lab) > 0)
        time.sleep(moment.uniform(0.0, 0.5))
        os.kill(os.getpid(), signal.SIGINT)

    with lab.meanwhile(interrupt):
        assert lab.rayfin_here("train", *settings, "scaling.strategy=deepspeed-zero2") == 130
    assert capsys.readouterr().err.endswith("rayfin: interrupted\n")
    (row,) = lab.rows()
    assert row.status == "interrupted"
    mark = lab.mark(row)
    assert lab.rayfin_here("train", *settings) == 0
    (row,) = lab.rows()
    assert row.status == "finished" and row.curve[-1]["step"] == 120
    assert lab.losses(row)[0] == mark, "it started anew, and not from its checkpoint"


@pytest.mark.long
def test_a_group_goes_on_whatever_of_it_is_killed(
    lab: Any,
    cluster: str,
    moment: random.Random,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A worker, its controller, and its driver: one trial through all of it, at whose end it is as
    one that ran through in one process.
    """
    settings = (*lab.settings, "data.streaming=true", "train.max_steps=80", "train.eval_steps=4")
    two = ("scaling.num_workers=2", "sweep.max_failures=2")
    driver = lab.typed("train", *settings, *two)
    workers: list[set[int]] = []

    def group() -> set[int]:
        return {process.pid for process in lab.processes("RayTrainWorker")}

    def further(by: int) -> None:
        """Waits until a new group has saved a step that lies so far ahead, and some time."""
        before = set().union(*workers)
        driver.until(lambda: len(now := group()) == 2 and not now & before)
        workers.append(group())
        step = saved(lab) + by
        driver.until(lambda: saved(lab) >= step)
        time.sleep(moment.uniform(0.0, 0.2))

    for victim in ("RayTrainWorker", "TrainController"):
        further(moment.randrange(1, 9))
        lab.processes(victim)[0].kill()
    further(moment.randrange(1, 9))
    assert group() == workers[-1], "a group starts anew as a whole, once for each kill"
    driver.kill()
    (row,) = lab.rows()
    assert row.status == "running"  # nobody was there to say otherwise
    reached, mark = saved(lab), lab.mark(row)

    # Alone: whoever goes on with it.
    assert lab.rayfin_here("train", *settings, "scaling.num_workers=1") == 0
    alone = steps_told(capsys.readouterr().err)
    for seen in (steps_told(driver.err), alone):
        assert seen == sorted(seen), "it started anew, and not from its checkpoint"
    assert alone[0] > reached
    (row,) = lab.rows()
    assert row.status == "finished" and row.curve[-1]["step"] == 80
    assert lab.losses(row)[0] == mark, "it started anew, and not from its checkpoint"
    streamed = TrialSpec.of(load_config(None, settings))
    whole = run_trial(streamed, lambda _: None, location=StoragePath(tmp_path / "whole"))
    for point, other in zip(row.curve, whole.curve, strict=True):
        if point.get("loss") != mark:
            assert point == pytest.approx(other, abs=1e-4)


def saved(lab: Any) -> int:
    """The step of the only trial's newest checkpoint."""
    return max((lab.saved(row) for row in lab.rows()), default=0)


def steps_told(lines: str) -> list[int]:
    """The steps at which a trial was evaluated, as the command told of them."""
    return [int(step) for step in re.findall(r"^step (\d+)/", lines, re.MULTILINE)]


def full(directory: Path) -> Callable[[], None]:
    """Fills the file system under `directory`; returns what frees it."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 4096):
            pass
    return filler.unlink


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB of its own."""
    location = tmp_path / "small"
    location.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "rayfin-test", location],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("a file system of its own needs root")
    yield location
    subprocess.run(["umount", "-l", location], check=True)


def test_a_full_disk_is_an_error_and_loses_no_finished_trial(
    lab: Any,
    cluster: str,
    small_disk: Path,
    moment: random.Random,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = (
        *lab.settings,
        "sweep.parameters={method.r: [2, 4, 8], train.learning_rate: [0.001, 0.002]}",
        "sweep.num_samples=6",
        "train.max_steps=4",
        "train.eval_steps=4",
        f"storage={small_disk}",
        # Elsewhere, so that it tells what became of each trial.
        f"history=sqlite:///{lab.storage / 'history.sqlite'}",
    )
    lab.storage.mkdir()
    free: list[Callable[[], None]] = []

    def fill(command: Any) -> None:
        command.until(lambda: any(row.status == "finished" for row in lab.rows()))
        time.sleep(moment.uniform(0.0, 0.5))
        free.append(full(small_disk))

    with lab.meanwhile(fill):
        code = lab.rayfin_here("sweep", *settings)
    err = capsys.readouterr().err
    assert code == 2, err
    assert "No space left" in err or "disk is full" in err, err
    assert "Traceback" not in err
    *before, last = lab.rows()
    assert before and {row.status for row in before} == {"finished"}
    assert last.status == "interrupted", "it is no fault of the trial's"
    free[0]()
    assert lab.rayfin_here("sweep", *settings, "--resume") == 0, capsys.readouterr().err
    rows = lab.rows()
    assert [row.status for row in rows] == ["finished"] * 6
    assert rows[: len(before)] == before, "a trial that had finished was touched"


@pytest.mark.long
def test_a_sweep_whose_trials_all_fail_exits_with_1_and_teaches_the_advisor_nothing(
    lab: Any, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def recommended() -> list[Any]:
        assert lab.rayfin_here("recommend", *lab.settings, "--json") == 0
        return [choice["config"] for choice in json.loads(capsys.readouterr().out)["choices"]]

    before = recommended()
    settings = (
        *lab.settings,
        "sweep.parameters.train.learning_rate=[1.0e30,2.0e30]",
        "sweep.num_samples=2",
        "train.max_steps=8",
        "train.eval_steps=2",
        "publish.name=colours",
    )
    assert lab.rayfin_here("sweep", *settings, "--json") == 1
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["best"] is None and told["adapter"] is None and "Traceback" not in err
    assert told["verdict"]["sentence"].startswith("No trial finished: 2 failed")
    rows = lab.rows()
    assert [row.status for row in rows] == ["failed"] * 2
    assert all("lower train.learning_rate (" in (row.error or "") for row in rows)
    assert all(row.trial_id in Path(told["report"]).read_text() for row in rows)
    assert recommended() == before
