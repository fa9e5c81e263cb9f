"""What gets no further is ended, and said: a trial whose disk stalls, workers that are out of step.

Real processes on one Ray of two CPUs; the bound is seconds here, and half an hour for a user.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle

from rayfin.config import DataConfig, ScalingConfig, load_config, with_values
from rayfin.config.schema import ModelConfig
from rayfin.data import load_corpus
from rayfin.models import load_base, load_tokenizer
from rayfin.paths import StoragePath
from rayfin.training import TrialResult, TrialSpec
from rayfin.training.strategies import WorkerLayout
from rayfin.training.workers import WorkerGroup
from rayfin.tuning.cluster import nodes, worker_resources

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]

HANG_MINUTES = 0.4
FAULT = "a fault of this worker alone"
RAISES, LEAVES_EARLY = 13, 14
"""Seeds: what becomes of worker 1 in such a trial."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The tiny model in a directory of its own."""
    directory = tmp_path / "model"
    base: Any = load_base(ModelConfig(name="tiny"), None, "cpu")
    base.save_pretrained(directory)
    load_tokenizer(ModelConfig(name="tiny")).save_pretrained(directory)
    return directory


def stalled(file: Path) -> Callable[[], None]:
    """Makes every read of `file` wait for ever, as on a disk that stalls; returns what mends it."""
    kept = file.with_name("kept")
    shutil.copy(file, kept)
    pipe = file.with_name("pipe")
    os.mkfifo(pipe)
    pipe.replace(file)
    return lambda: kept.replace(file)  # type: ignore[return-value]


def test_a_trial_whose_disk_stalls_fails_and_the_sweep_goes_on_with_its_cpus(
    cluster: str, lab: Any, model: Path
) -> None:
    rates = "sweep.parameters.train.learning_rate=[0.001,0.002,0.0000001,0.0000002]"
    sweep = lab.script(
        "sweep_qlora.py", "--address", cluster, f"model.name={model}", "train.max_steps=8",
        "train.eval_steps=2", "sweep.search=grid", "sweep.num_samples=4", rates,
        "sweep.scheduler=asha", "sweep.reduction_factor=2", "sweep.max_failures=0",
        "sweep.parameters.method.r=[8]", f"scaling.hang_timeout_minutes={HANG_MINUTES}",
    )  # fmt: skip
    # The driver has read the model by then, and the process that trains has not begun to.
    sweep.until(lambda: ray.available_resources().get("CPU", 0.0) < 2)
    mend = stalled(model / "config.json")
    hung = sweep.until(lambda: next((row for row in lab.rows() if row.status == "failed"), None))
    mend()
    assert sweep.end() == 0, sweep.err
    said = f"no progress for {HANG_MINUTES:g} minutes in reading the base model's configuration: "
    assert (hung.error or "").startswith(said), hung.error
    assert "look at the disk or network that it waits for" in (hung.error or "")
    assert str(lab.root) not in (hung.error or "")

    rows = [row for row in lab.rows() if row.trial_id != hung.trial_id]
    assert len(rows) == 3 and {row.status for row in rows} == {"finished", "stopped"}
    pids = {row.scenario["worker"]["pid"] for row in rows}
    assert len(pids) == 1, "the process that hung was not replaced once, and then kept"
    give_up = time.monotonic() + 540
    while ray.available_resources().get("CPU", 0.0) < 2:
        assert time.monotonic() < give_up, "what stopped trials held is not free again"
        time.sleep(0.1)


class Faulty:
    """Comes to the workers with their data, and is at work as soon as they have it."""

    def __reduce__(self) -> Any:
        return make_faulty, ()


def make_faulty() -> dict[str, Any]:
    """In a worker: what the seed of a trial says becomes of worker 1 at its third step."""
    import ray.train

    from rayfin.training.trainer import TrialTrainer

    whole = TrialTrainer.training_step

    def training_step(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = whole(self, model, *args, **kwargs)
        mine = ray.train.get_context().get_world_rank() == 1 and self.state.global_step == 2
        if mine and self.train_config.seed == RAISES:
            raise RuntimeError(FAULT)
        if mine and self.train_config.seed == LEAVES_EARLY:
            self.control.should_training_stop = True
        return loss

    TrialTrainer.training_step = training_step  # type: ignore[method-assign]
    return {}


def test_workers_that_are_out_of_step_fail_and_say_why(
    cluster: str, lab: Any, tmp_path: Path
) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    settings = ("train.max_steps=6", "train.eval_steps=3", "train.per_device_train_batch_size=2")
    config = load_config(None, [*lab.settings, *settings])
    corpora: Any = {config.data: load_corpus(config.data), DataConfig(path="none"): Faulty()}

    def train(workers: WorkerGroup, seed: int) -> TrialResult:
        spec = TrialSpec.of(with_values(config, {"train.seed": seed}))
        location = StoragePath(tmp_path / str(seed))
        return workers.train(spec, lambda _: None, location=location, max_failures=0)

    each = worker_resources(ScalingConfig(num_workers=2), nodes())
    with WorkerGroup(
        WorkerLayout(2), resources=each, corpora=corpora, hang_minutes=HANG_MINUTES
    ) as workers:
        raised = train(workers, RAISES)
        assert raised.status == "failed" and FAULT in (raised.error or ""), raised.error

        uneven = train(workers, LEAVES_EARLY)
        assert uneven.status == "failed"
        assert (uneven.error or "").startswith("worker 0: no progress for"), uneven.error
        assert "training step 4" in (uneven.error or ""), uneven.error

        whole = train(workers, 0)
        assert whole.status == "finished", whole.error
