"""What a sweep survives: Ctrl-C, a driver that is killed, workers that are killed, divergence."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from rayfin.history import TrialRecord

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Seconds a trial, and a checkpoint every tenth of one.
LONG = ("train.max_steps=400", "train.eval_steps=40", "sweep.scheduler=none")


def rates(*values: float) -> str:
    return f"sweep.parameters.train.learning_rate=[{','.join(map(str, values))}]"


def test_ctrl_c_and_a_killed_driver_lose_nothing(lab: Any) -> None:
    command = ("sweep_qlora.py", *LONG, "sweep.num_samples=4")
    interrupted = lab.script(*command)
    first = interrupted.amid(finished=1)
    assert interrupted.interrupt() == 130, interrupted.err
    assert "--resume" in interrupted.out
    done = [row for row in lab.rows() if row.status == "finished"]
    assert len(done) == 1 and [row.trial_id for row in lab.rows()][1:] == [first.trial_id]
    marked = {first.trial_id: lab.mark(first)}

    killed = lab.script(*command, "--resume")
    second = killed.amid(finished=2)
    killed.kill()
    assert second.trial_id != first.trial_id
    done = [row for row in lab.rows() if row.status == "finished"]
    marked[second.trial_id] = lab.mark(second)

    resumed = lab.script(*command, "--resume")
    assert resumed.end() == 0, resumed.err
    rows = {row.trial_id: row for row in lab.rows()}
    assert [row.status for row in rows.values()] == ["finished"] * 4
    assert len({row.fingerprint for row in rows.values()}) == 4
    for row in done:
        assert rows[row.trial_id] == row, "a finished trial was touched"
    for trial_id, loss in marked.items():
        assert lab.losses(rows[trial_id])[0] == loss, "it started anew, and not from its checkpoint"
        assert rows[trial_id].curve[-1]["step"] == 400
        assert not lab.checkpoints(rows[trial_id])


def test_a_killed_worker_and_a_diverged_trial_leave_the_others_alone(lab: Any) -> None:
    sweep = lab.script(
        "sweep_qlora.py", *LONG, "sweep.search=grid", "sweep.num_samples=3",
        "sweep.parameters.method.r=[8]", rates(1e-3, 1e30, 2e-3),
    )  # fmt: skip
    victim = sweep.until(running_trial(lab))
    os.kill(victim.scenario["worker"]["pid"], signal.SIGKILL)
    marked = lab.mark(victim)
    assert sweep.end() == 0, sweep.err

    retried, diverged, other = lab.rows()
    assert retried.trial_id == victim.trial_id and retried.status == "finished"
    assert lab.losses(retried)[0] == marked
    assert retried.scenario["worker"]["pid"] != victim.scenario["worker"]["pid"]
    assert diverged.status == "failed"
    assert "lower train.learning_rate (1e+30)" in (diverged.error or "")
    assert other.status == "finished" and other.metrics["steps"] == 400
    (report,) = lab.storage.glob("sweeps/*/report.html")
    assert diverged.trial_id in report.read_text()


def test_a_worker_killed_too_often_is_a_failed_trial(lab: Any) -> None:
    sweep = lab.script(
        "sweep_qlora.py", *LONG, "sweep.search=grid", "sweep.num_samples=2", "sweep.max_failures=0",
        "sweep.parameters.method.r=[8]", rates(1e-3, 1e30),
    )  # fmt: skip
    victim = sweep.until(running_trial(lab))
    os.kill(victim.scenario["worker"]["pid"], signal.SIGKILL)
    assert sweep.end() == 1, sweep.err  # no trial finished, and the sweep says so
    assert "No trial finished" in sweep.out

    killed, diverged = lab.rows()
    assert killed.trial_id == victim.trial_id and killed.status == "failed"
    assert "worker process died" in (killed.error or "")
    assert diverged.status == "failed" and "learning_rate" in (diverged.error or "")


def running_trial(lab: Any) -> Callable[[], TrialRecord | None]:
    """Asks for a trial that runs and has a checkpoint to go on from."""

    def ask() -> TrialRecord | None:
        rows = [row for row in lab.rows() if row.status == "running" and "worker" in row.scenario]
        return next((row for row in rows if lab.checkpoints(row)), None)

    return ask
