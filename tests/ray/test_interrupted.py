"""What a sweep survives: Ctrl-C, a driver that is killed, workers that are killed, divergence."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from rayfin.adapters import Registry
from rayfin.cli import main
from rayfin.history import TrialRecord
from rayfin.training.spec import TrialResult
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
