"""Sweeps whose trials are of two workers each, on two CPUs."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS = 120
SWEEP = (
    "sweep.parameters.train.learning_rate=[0.0002,0.0005]",
    "sweep.search=grid",
    "sweep.num_samples=2",
    "sweep.scheduler=none",
    f"train.max_steps={STEPS}",
    "train.eval_steps=20",
    "train.per_device_train_batch_size=2",
)


def test_trials_of_two_workers_outlive_ctrl_c_and_their_listener(
    lab: Any, moment: random.Random
) -> None:
    two = (*SWEEP, "scaling.num_workers=2", "scaling.strategy=ddp")
    driver = lab.rayfin("sweep", *two)
    before = driver.amid(finished=0, step=moment.randrange(1, STEPS - 20))
    assert driver.interrupt() == 130, driver.err
    # Ctrl-C may come after its last step: it is recorded then, or what it had saved is there.
    recorded = lab.rows()[0].status == "finished"
    mark = lab.losses(lab.rows()[0])[0] if recorded else lab.mark(before)

    driver = lab.rayfin("sweep", *two, "--resume")
    second = driver.amid(finished=1, step=moment.randrange(1, STEPS - 40))
    # What its group holds outlives it, and two CPUs have room for one group only.
    os.kill(second.scenario["worker"]["pid"], signal.SIGKILL)
    assert driver.end() == 0, driver.err
    together = lab.rows()
    assert [row.trial_id for row in together] == [before.trial_id, second.trial_id]
    assert lab.losses(together[0])[0] == mark
    for row in together:
        assert row.status == "finished" and row.scenario["hardware"]["num_workers"] == 2
        assert (Path(row.directory or "") / "adapter" / "adapter_config.json").exists()
        assert not (Path(row.directory or "") / "ray" / "held.json").exists()


def test_an_axis_that_the_strategy_refuses_is_named(lab: Any) -> None:
    axis = "sweep.parameters.method.type=[lora,adalora]"
    both = ("scaling.num_workers=2", "scaling.strategy=deepspeed-zero2")
    driver = lab.rayfin("sweep", axis, *both)
    assert driver.end() == 2
    said = "sweep.parameters.method.type=adalora: scaling.strategy=deepspeed-zero2 can't"
    assert said in driver.err
