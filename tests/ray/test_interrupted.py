"""What a sweep survives: Ctrl-C, a driver that is killed, workers that are killed, divergence."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import pytest

from rayfin.history import TrialRecord

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Seconds a trial, and a checkpoint every tenth of one.
STEPS = 100
LONG = (f"train.max_steps={STEPS}", f"train.eval_steps={STEPS // 10}", "sweep.scheduler=none")


@pytest.mark.parametrize(("search", "killed"), [("tpe", False), ("advisor", True)])
def test_ctrl_c_and_a_killed_driver_lose_nothing(
    lab: Any, search: str, killed: bool, moment: random.Random
) -> None:
    command = ("sweep_qlora.py", *LONG, "sweep.num_samples=4", f"sweep.search={search}")
    ended = lab.script(*command)
    unfinished = ended.amid(finished=1, step=moment.randrange(1, STEPS * 8 // 10))
    if killed:
        ended.kill()
    else:
        assert ended.interrupt() == 130, ended.err
        assert "--resume" in ended.out
    done, one = lab.rows()
    assert (done.status, one.trial_id) == ("finished", unfinished.trial_id)
    marked = lab.mark(unfinished)

    resumed = lab.script(*command, "--resume")
    assert resumed.end() == 0, resumed.err
    rows = lab.rows()
    assert [row.status for row in rows] == ["finished"] * 4
    assert len({row.fingerprint for row in rows}) == 4
    assert rows[0] == done, "a finished trial was touched"
    assert rows[1].trial_id == unfinished.trial_id
    assert lab.losses(rows[1])[0] == marked, "it started anew, and not from its checkpoint"
    assert rows[1].curve[-1]["step"] == STEPS
    assert not lab.checkpoints(rows[1])


def test_killed_workers_and_a_diverged_trial_leave_the_others_alone(lab: Any) -> None:
    rates = "sweep.parameters.train.learning_rate=[0.001,1e30,0.002]"
    sweep = lab.script(
        "sweep_qlora.py", *LONG, "sweep.search=grid", "sweep.num_samples=3",
        "sweep.max_failures=1", "sweep.parameters.method.r=[8]", rates,
    )  # fmt: skip

    def kill(trial: int, *, but: int = 0) -> TrialRecord:
        """Kills the process that trains, once it has written a checkpoint."""
        row: TrialRecord = sweep.until(lambda: training(lab, trial, but))
        os.kill(row.scenario["worker"]["pid"], signal.SIGKILL)
        return row

    once = kill(0)
    kill(0, but=once.scenario["worker"]["pid"])
    victim = kill(2)
    marked = lab.mark(victim)
    assert sweep.end() == 0, sweep.err

    killed, diverged, retried = lab.rows()
    assert killed.status == "failed" and "worker process died" in (killed.error or "")
    assert diverged.status == "failed"
    assert "lower train.learning_rate (1e+30)" in (diverged.error or "")
    assert retried.status == "finished" and retried.metrics["steps"] == STEPS
    assert lab.losses(retried)[0] == marked, "it started anew, and not from its checkpoint"
    assert retried.scenario["worker"]["pid"] != victim.scenario["worker"]["pid"]
    (report,) = lab.storage.glob("sweeps/*/report.html")
    assert all(row.trial_id in report.read_text() for row in lab.rows())


def training(lab: Any, trial: int, but: int) -> TrialRecord | None:
    """That trial, if it runs, in another process than `but`, and has a checkpoint to go on from."""
    for row in lab.rows()[trial : trial + 1]:
        pid = row.scenario.get("worker", {}).get("pid", but)
        if row.status == "running" and pid != but and lab.checkpoints(row):
            return row
    return None
