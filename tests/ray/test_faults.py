"""Whatever is killed, at a random moment: the trial ends as it would have, or says why it can't.

A sweep survives Ctrl-C, a driver that is killed, workers that are killed, and divergence. Once each
in every run of the tests, and `pytest tests/ray --kills 5` takes five moments.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rayfin.adapters import Registry
from rayfin.cli import main
from rayfin.config import load_config
from rayfin.history import TrialRecord
from rayfin.paths import StoragePath
from rayfin.training import TrialSpec
from rayfin.training.spec import TrialResult
from rayfin.training.trial import run_trial
from rayfin.tuning.plan import PlannedTrial
from rayfin.tuning.record import Recorder

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

# Seconds a trial, and a checkpoint every tenth of one.
STEPS = 100
# Each good rate is better than those before it at every rung, so that ASHA keeps its trial.
RATES = (1e-4, 3e-4, 1e30, 1e-3, 1e-5, 2e-3, 4e-3)
SWEEP = (
    f"train.max_steps={STEPS}",
    f"train.eval_steps={STEPS // 10}",
    f"sweep.parameters.train.learning_rate={list(RATES)}",
    "sweep.search=grid",
    f"sweep.num_samples={len(RATES)}",
    "sweep.max_failures=1",
    "publish.name=colours",
)


def test_a_sweep_under_asha_loses_nothing_to_whatever_is_killed(
    lab: Any,
    cluster: str,
    moment: random.Random,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(command: Any) -> None:
        step = moment.randrange(1, STEPS // 2)
        command.until(lambda: (row := training(lab, 1, but=0)) and lab.saved(row) >= step)
        os.kill(os.getpid(), signal.SIGINT)

    with lab.meanwhile(interrupt):
        assert lab.rayfin_here("sweep", *lab.settings, *SWEEP) == 130
    assert "--resume" in capsys.readouterr().out
    untouched, first = lab.rows()[:1], lab.rows()[1]
    assert [row.status for row in lab.rows()] == ["finished", "interrupted"]
    marked = {first.trial_id: lab.mark(first)}
    traces = lab.root / "unpickled"
    plant_pickles(lab.storage, traces)

    killed = lab.rayfin("sweep", *SWEEP, "--resume")
    second = killed.amid(finished=2, step=moment.randrange(1, STEPS // 2))
    killed.kill()
    goes_on, diverged, running = lab.rows()[1:]
    assert goes_on.trial_id == first.trial_id and goes_on.status == "finished"
    assert diverged.status == "failed"
    assert "lower train.learning_rate (1e+30)" in (diverged.error or "")
    assert running.trial_id == second.trial_id
    assert running.status == "running"  # nobody was there to say otherwise
    assert main(["history", "list", f"storage={lab.storage}", "--json"]) == 0
    stood = {row["trial_id"]: row["status"] for row in json.loads(capsys.readouterr().out)}
    assert stood[second.trial_id] == "interrupted"
    untouched += [goes_on, diverged]
    marked[second.trial_id] = lab.mark(second)
    assert published(lab) == []

    killed_before_it_is_recorded(RATES.index(4e-3), lab, monkeypatch)
    with lab.meanwhile(lambda command: kill_workers(command, lab)) as faults:
        assert lab.rayfin_here("sweep", *lab.settings, *SWEEP, "--resume") == 0
    rows = {row.trial_id: row for row in lab.rows()}
    assert len({row.fingerprint for row in rows.values()}) == len(rows) == len(RATES)
    for row in untouched:
        assert rows[row.trial_id] == row, "a trial that had ended was touched"
    assert rows[second.trial_id].status == "finished"
    stopped, twice, once = list(rows.values())[4:]
    # The rungs hold what trials of the drivers before came to; none holds the diverged one's NaN.
    assert (stopped.status, stopped.curve[-1]["step"]) == ("stopped", STEPS // 10)
    assert twice.status == "failed"
    assert "worker process died: The actor died unexpectedly" in (twice.error or "")
    assert once.status == "finished"
    assert once.scenario["worker"]["pid"] != faults.victim.scenario["worker"]["pid"]
    marked[once.trial_id] = faults.mark
    for trial_id, loss in marked.items():
        assert lab.losses(rows[trial_id])[0] == loss, "it started anew, and not from its checkpoint"
        assert rows[trial_id].curve[-1]["step"] == rows[trial_id].metrics["steps"] == STEPS
        assert not lab.checkpoints(rows[trial_id])
    (report,) = lab.storage.glob("sweeps/*/report.html")
    assert all(trial_id in report.read_text() for trial_id in rows)
    assert published(lab) == [once.trial_id]
    assert list(traces.iterdir()) == [], "what lies in a sweep's folders was run"


class Trace:
    """Leaves a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def plant_pickles(storage: Path, traces: Path) -> None:
    """In each folder of a half-done sweep, rayfin's own and Tune's: what Tune and Ray Train would
    restore themselves from, and where they look for an error.
    """
    traces.mkdir()
    pickle.loads(pickle.dumps(Trace(traces / "tried")))
    (traces / "tried").unlink()  # it does what it is for
    (tuner,) = storage.glob("ray/*/tuner.pkl")  # where Tune itself has written
    (sweep,) = storage.glob("sweeps/*/config.yaml")
    trials = [*tuner.parent.iterdir(), *sweep.parent.glob("trials/*")]
    folders = [tuner.parent, sweep.parent, *filter(Path.is_dir, trials)]
    assert len(folders) > 4
    for number, folder in enumerate(folders):
        for name in ("tuner.pkl", "trainer.pkl", "error.pkl", "params.pkl", "trainable.pkl",
                     "searcher-state-a.pkl", "search_gen_state-a.json"):  # fmt: skip
            (folder / name).write_bytes(pickle.dumps(Trace(traces / f"{number}-{name}")))
        state = pickle.dumps(Trace(traces / f"{number}-state")).hex()
        (folder / "experiment_state-2999-01-01_00-00-00.json").write_text(
            json.dumps({"_type": "CLOUDPICKLE_FALLBACK", "value": state})
        )


def kill_workers(command: Any, lab: Any) -> None:
    """One trial's process twice, which is once too often, and another's once."""

    def kill(trial: int, *, but: int = 0) -> TrialRecord:
        """Kills the process that trains, once it has written a checkpoint."""
        row: TrialRecord = command.until(lambda: training(lab, trial, but))
        os.kill(row.scenario["worker"]["pid"], signal.SIGKILL)
        return row

    once = kill(RATES.index(2e-3))
    kill(RATES.index(2e-3), but=once.scenario["worker"]["pid"])
    command.victim = kill(RATES.index(4e-3))
    command.mark = lab.mark(command.victim)


@pytest.mark.long
def test_a_sweep_that_an_earlier_rayfin_left_half_done_goes_on(
    storage_v1: Path, lab: Any, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.storage = storage_v1 / "runs"
    before = {row.trial_id: row for row in lab.rows()}
    *finished, left = [row for row in before.values() if row.sweep_id != "train"]
    assert [row.status for row in finished] == ["finished"] * 2 and left.status == "interrupted"
    marked = lab.mark(left)
    assert lab.rayfin_here("sweep", "sweep.yaml", "--resume") == 0

    after = {row.trial_id: row for row in lab.rows()}
    went_on, (added,) = after[left.trial_id], after.keys() - before.keys()
    assert went_on.status == "finished" and went_on.fingerprint == left.fingerprint
    assert lab.losses(went_on)[0] == marked, "it started anew, and not from its checkpoint"
    assert all(after[row.trial_id] == row for row in before.values() if row is not left)
    assert after[added].status == "finished" and after[added].sweep_id == left.sweep_id
    spaces = [(r, rate) for r in (1, 2) for rate in (1e-3, 2e-3)]
    trained = [row.spec for row in after.values() if row.sweep_id == left.sweep_id]
    found = [(spec["method"]["r"], spec["train"]["learning_rate"]) for spec in trained]
    assert sorted(found) == spaces

    # Another sweep of the same space has nothing left to train: fingerprints are what they were.
    capsys.readouterr()
    assert lab.rayfin_here("sweep", "sweep.yaml") == 0
    assert capsys.readouterr().err.count("from the history (") == 4


def training(lab: Any, trial: int, but: int) -> TrialRecord | None:
    """That trial, if it runs, in another process than `but`, and has a checkpoint to go on from."""
    for row in lab.rows()[trial : trial + 1]:
        pid = row.scenario.get("worker", {}).get("pid", but)
        if row.status == "running" and pid != but and lab.checkpoints(row):
            return row
    return None


def killed_before_it_is_recorded(number: int, lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """That trial's process is killed after it has told its end, and before anything knows of it."""
    reports = Recorder.reports

    def report(self: Recorder, trial: PlannedTrial, result: TrialResult) -> None:
        last = [row.trial_id for row in lab.rows()[number : number + 1]] == [trial.trial_id]
        if last and result.status == "finished":
            worker = psutil.Process(result.scenario["worker"]["pid"])
            worker.kill()
            worker.wait(540)
        reports(self, trial, result)

    monkeypatch.setattr(Recorder, "reports", report)


def published(lab: Any) -> list[str]:
    """The trials whose adapters are published, whole."""
    registry = Registry(lab.storage / "adapters")
    for version in registry.list():
        registry.verify(version.ref)
    return [version.metadata["trial_id"] for version in registry.list()]


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


@pytest.mark.long
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
