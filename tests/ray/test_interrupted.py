"""What a sweep survives: Ctrl-C, a driver that is killed, workers that are killed, divergence."""

from __future__ import annotations

import json
import os
import random
import signal
from typing import Any

import pytest

from rayfin.cli import main
from rayfin.history import TrialRecord

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Seconds a trial, and a checkpoint every tenth of one.
STEPS = 100
LONG = (f"train.max_steps={STEPS}", f"train.eval_steps={STEPS // 10}", "sweep.scheduler=none")


@pytest.mark.parametrize("search", ["tpe", "advisor"])
def test_ctrl_c_and_a_killed_driver_lose_nothing(
    lab: Any, search: str, moment: random.Random, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("sweep_qlora.py", *LONG, "sweep.num_samples=4", f"sweep.search={search}")
    interrupted = lab.script(*command)
    first = interrupted.amid(finished=1, step=moment.randrange(1, STEPS * 8 // 10))
    assert interrupted.interrupt() == 130, interrupted.err
    assert "--resume" in interrupted.out
    done = [row for row in lab.rows() if row.status == "finished"]
    assert len(done) == 1 and [row.trial_id for row in lab.rows()][1:] == [first.trial_id]
    assert [row.status for row in lab.rows()] == ["finished", "interrupted"]
    marked = {first.trial_id: lab.mark(first)}

    killed = lab.script(*command, "--resume")
    second = killed.amid(finished=2, step=moment.randrange(1, STEPS * 8 // 10))
    killed.kill()
    assert second.trial_id != first.trial_id
    assert [row.status for row in lab.rows()][2] == "running"  # nobody was there to say otherwise
    assert main(["history", "list", f"storage={lab.storage}", "--json"]) == 0
    stood = {row["trial_id"]: row["status"] for row in json.loads(capsys.readouterr().out)}
    assert stood[second.trial_id] == "interrupted"
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
        assert rows[trial_id].curve[-1]["step"] == STEPS
        assert not lab.checkpoints(rows[trial_id])


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
    assert killed.status == "failed"
    assert "worker process died: The actor died unexpectedly" in (killed.error or "")
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
