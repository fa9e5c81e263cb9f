"""A sweep whose weak trials are stopped by what their curves predict."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(1200)]


def test_a_sweep_stops_the_trials_that_cannot_end_as_the_best(lab: Any, cluster: str) -> None:
    sweep = (
        "sweep",
        *lab.settings,
        *("train.max_steps=32", "train.eval_steps=4", "method.type=full"),
        *("sweep.search=grid", "sweep.num_samples=3", "sweep.scheduler=predictive"),
        "sweep.parameters={train.learning_rate: [3e-3, 1e-6, 2e-6]}",
    )
    assert lab.rayfin_here(*sweep) == 0
    rows = {row.spec["train"]["learning_rate"]: row for row in lab.rows()}
    assert {rate: row.status for rate, row in rows.items()} == {
        3e-3: "finished",
        1e-6: "stopped",
        2e-6: "stopped",
    }
    assert all(rows[rate].metrics["steps"] <= 16 for rate in (1e-6, 2e-6))
    assert rows[1e-6].directory is not None and not lab.checkpoints(rows[1e-6])

    assert lab.rayfin_here(*sweep, "--resume") == 0
    assert {row.trial_id: row.status for row in lab.rows()} == {
        row.trial_id: row.status for row in rows.values()
    }
