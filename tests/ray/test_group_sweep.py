"""A sweep whose trials are of two workers each, and whose storage is a bucket.

Its first machine is this process, on a Ray that lives on. Another, with a disk of its own, goes on.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from rayfin.history import TrialRecord
from rayfin.paths import StoragePath
from rayfin.training import TrialResult, TrialSpec
from rayfin.training.trial import run_trial

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

# Seconds of each trial that something befalls.
STEPS = (90, 140, 10, 141)
SWEEP = (
    f"sweep.parameters.train.max_steps={list(STEPS)}",
    "sweep.search=grid",
    "sweep.num_samples=4",
    "sweep.scheduler=none",
    "train.eval_steps=10",
    "train.per_device_train_batch_size=2",
)
GROUP = ("scaling.num_workers=2", "sweep.max_failures=1")
WORKER = "RayTrainWorker"
DISPENSABLE = (
    "_AutoscalingCoordinatorActor",
    "DatasetManager",
    "PlacementGroupCleaner",
    "PreemptionWatcher",
)
"""Processes of Ray Train's that a group on this machine alone has no use for."""
ENDED_WITHIN = 540.0


@pytest.fixture(scope="module", autouse=True)
def s3_reached(s3: dict[str, str]) -> Iterator[None]:
    """The server is known to Ray's processes, which have the environment of when Ray started."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.items():
            patch.setenv(name, value)
        yield


def test_groups_lose_nothing_and_compute_what_one_process_does(
    lab: Any,
    cluster: str,
    bucket: str,
    moment: random.Random,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep = (*SWEEP, *lab.in_bucket(bucket))
    with lab.meanwhile(lambda command: kill_the_listener(command, lab, moment)) as faults:
        assert lab.rayfin_here("sweep", *lab.settings, *sweep, *GROUP) == 130
    # Ctrl-C: the group ends where it stands, and not with the Ray that it ran on.
    assert psutil.wait_procs(lab.processes(WORKER), ENDED_WITHIN)[1] == []
    first, interrupted = lab.rows()
    assert (first.status, interrupted.status) == ("finished", "interrupted")
    assert not (StoragePath.at(interrupted.directory) / "adapter").exists()
    # What the listener's group held outlived it, and two CPUs have room for one group only.
    assert len(faults.workers) == 3, "it did not start anew, or each trial in its own processes"
    assert faults.workers[1] == faults.workers[2]
    assert not faults.workers[0] & faults.workers[1]
    assert [row.scenario["worker"]["base_loads"] for row in (first, interrupted)] == [1, 1]
    for row in (first, interrupted):
        assert row.scenario["hardware"]["strategy"] == "ddp"
        assert "of each worker's" in row.scenario["hardware"]["strategy_why"]
    mark = lab.mark(interrupted)

    lab.environment |= lab.disk("another")
    # What a strategy takes apart can't be the next trial's. One failure is one too many.
    sharded = (*GROUP, "scaling.strategy=fsdp", "sweep.max_failures=0")
    driver = lab.rayfin("sweep", *sweep, *sharded, "--resume")
    last = driver.amid(finished=3)
    assert not any(lab.processes(name) for name in DISPENSABLE)
    (queue,) = lab.processes("ray::TrialQueue")
    queue.kill()
    assert driver.end() == 0, driver.err
    rows = lab.rows()
    assert rows[0] == first, "a finished trial was touched"
    assert rows[1].trial_id == interrupted.trial_id and rows[3].trial_id == last.trial_id
    assert [row.status for row in rows] == ["finished"] * 3 + ["failed"]
    error = rows[3].error or ""
    assert "died; the same command goes on from the newest checkpoint" in error
    assert "Traceback" not in error and error.isprintable()
    assert lab.losses(rows[1])[0] == mark, "it started anew, and not from its checkpoint"
    assert [row.scenario["worker"]["base_loads"] for row in rows[1:3]] == [1, 2]
    for row in rows[1:3]:
        assert row.scenario["hardware"]["strategy"] == "fsdp"
    for row in rows[:3]:
        location = StoragePath.at(row.directory)
        assert str(location).startswith(f"{bucket}/sweeps/")
        assert row.scenario["hardware"]["num_workers"] == 2
        assert not lab.checkpoints(row) and not (location / "ray" / "held.json").download_file()
        one = run_trial(
            TrialSpec.model_validate(row.spec),
            lambda _: None,
            location=StoragePath(tmp_path / row.trial_id),
        )
        as_one_process_does(row, one, but=mark)

    # Afterwards, on that machine: nothing is left to train.
    monkeypatch.setenv("RAYFIN_CACHE", lab.environment["RAYFIN_CACHE"])
    registry = lab.root / "registry"
    publish = ("publish.name=best", f"publish.storage={registry}", "sweep.report_samples=1")
    capsys.readouterr()
    assert lab.rayfin_here("sweep", *lab.settings, *sweep, *sharded, *publish, "--resume") == 0
    assert lab.rows() == rows
    report = StoragePath.at(bucket) / "sweeps" / rows[0].sweep_id / "report.html"
    assert str(report) in capsys.readouterr().out and report.download_file()
    text = report.path.read_text()
    assert all(row.trial_id in text for row in rows) and text.count('class="sample"') == 1
    assert (registry / "adapters" / "best" / "1" / "adapter_config.json").is_file()
    for row in rows[:3]:
        copies = StoragePath.at(row.directory).path
        assert copies.is_relative_to(lab.root / "another")
        assert not list(copies.rglob("*.safetensors")), "copies are let go"


def kill_the_listener(command: Any, lab: Any, moment: random.Random) -> None:
    """SIGKILL to the process that listens to the first trial's group, Ctrl-C amid the second."""

    def training(trial: int, but: int = 0, step: int = 1) -> TrialRecord | None:
        for row in lab.rows()[trial : trial + 1]:
            pid = row.scenario.get("worker", {}).get("pid", but)
            if row.status == "running" and pid != but and lab.saved(row) >= step:
                return row
        return None

    def listener(row: TrialRecord) -> int:
        command.workers.append({process.pid for process in lab.processes(WORKER)})
        assert len(command.workers[-1]) == 2
        assert not any(lab.processes(name) for name in DISPENSABLE)
        pid: int = row.scenario["worker"]["pid"]
        return pid

    command.workers = []
    step = moment.randrange(1, STEPS[0] // 3)
    killed = listener(command.until(lambda: training(0, step=step)))
    os.kill(killed, signal.SIGKILL)
    again = listener(command.until(lambda: training(0, but=killed)))
    step = moment.randrange(1, STEPS[1] // 2)
    assert listener(command.until(lambda: training(1, step=step))) == again
    os.kill(os.getpid(), signal.SIGINT)


def as_one_process_does(row: TrialRecord, one: TrialResult, but: float) -> None:
    """`but`: the loss that was written into a checkpoint."""
    for point, other in zip(row.curve, one.curve, strict=True):
        if point.get("loss") != but:
            assert point == pytest.approx(other, abs=1e-4)
    adapter = StoragePath.at(row.directory) / "adapter"
    assert adapter.download() and one.adapter is not None
    ours, theirs = (
        load_file(path / "adapter_model.safetensors") for path in (adapter.path, one.adapter.path)
    )
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert (weight - theirs[name]).abs().max() < 1e-4, name


def test_an_axis_that_the_strategy_refuses_is_named(
    lab: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    axis = "sweep.parameters.method.type=[lora,adalora]"
    both = ("scaling.num_workers=2", "scaling.strategy=deepspeed-zero2")
    assert lab.rayfin_here("sweep", *lab.settings, axis, *both) == 2
    said = "sweep.parameters.method.type=adalora: scaling.strategy=deepspeed-zero2 can't"
    assert said in capsys.readouterr().err
