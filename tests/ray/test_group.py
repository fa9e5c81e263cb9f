"""Several processes for one trial, and a sweep on a cluster that was there before.

First, on a new Ray, a sweep whose trials are of two workers each, and whose storage is a bucket.
Its first machine is this process, on a Ray that lives on. Another, with a disk of its own, goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import psutil
import pytest
import ray
from safetensors.torch import load_file

from rayfin.config import Config, ScalingConfig, load_config
from rayfin.data import load_corpus
from rayfin.errors import HardwareError
from rayfin.history import History, TrialRecord
from rayfin.paths import Storage, StoragePath
from rayfin.training import TrialResult, TrialSpec
from rayfin.training.strategies import WorkerLayout
from rayfin.training.trial import run_trial
from rayfin.training.trial_queue import Job, TrialQueue
from rayfin.training.workers import WorkerGroup, give_back
from rayfin.tuning.cluster import nodes, worker_resources
from rayfin.tuning.single import train_once

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

# Seconds of each trial that something befalls.
STEPS = (60, 90, 10, 91)
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


@pytest.fixture
def config(lab: Any) -> Config:
    """Two samples a worker and step; without dropout, which each worker draws for itself."""
    settings = ("train.per_device_train_batch_size=4", "train.max_steps=12", "train.eval_steps=4")
    return load_config(None, [*lab.settings, *settings])


def in_group(config: Config, directory: Path, report: Any = lambda _: None) -> TrialResult:
    with WorkerGroup(
        WorkerLayout(2, "ddp"),
        resources=worker_resources(ScalingConfig(num_workers=2), nodes()),
        corpora={config.data: load_corpus(config.data)},
    ) as workers:
        return workers.train(TrialSpec.of(config), report, location=StoragePath(directory))


def test_a_group_that_ray_ends_for_want_of_memory_is_told_from_one_that_fails(
    cluster: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = ["1 worker(s) were killed due to the node running low on memory.", "a fault"]

    def fit() -> None:
        raise RuntimeError(reasons[(len(tried) - 1) // 2])

    tried: list[Path] = []

    def trainer(self: WorkerGroup, directory: Path) -> Any:
        tried.append(directory)
        return SimpleNamespace(fit=fit)

    monkeypatch.setattr(WorkerGroup, "_trainer", trainer)
    ends = [in_group(config, tmp_path / name) for name in ("first", "second")]
    assert [end.status for end in ends] == ["oom", "failed"]
    assert "running low on memory" in (ends[0].error or "")
    assert len(tried) == 4, "each is tried once more"


def test_what_a_lost_machine_held_in_a_group_is_given_back_from_another(
    cluster: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = ray.util.placement_group([{"CPU": 1}])
    assert group.wait(540)
    job = Job(0, TrialSpec.of(load_config(None, [])), StoragePath.at(bucket))

    async def work() -> None:
        queue = TrialQueue(1)
        await queue.give(job)
        await queue.begin(group.id.hex())

    asyncio.run(work())
    monkeypatch.setenv("RAYFIN_CACHE", str(tmp_path / "another"))
    held = StoragePath.at(bucket) / "ray" / "held.json"
    give_back(held)
    states = ray.util.placement_group_table(group)
    assert states["state"] == "REMOVED"
    assert not held.download_file()
    give_back(held)  # there is nothing, which is no error


@pytest.mark.patient
def test_a_worker_that_hangs_is_given_up_and_its_group_starts_again(
    cluster: str,
    lab: Any,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "5")  # rayfin's own: 120
    seen: list[int] = []

    def freeze(result: TrialResult) -> None:
        seen.append(result.metrics["steps"])
        if len(seen) == 2:
            lab.processes("RayTrainWorker")[-1].suspend()

    end = in_group(config, tmp_path / "group", freeze)
    assert end.status == "finished", end.error
    assert seen == [4, 8, 8], "it started anew, and not from its checkpoint"


def test_a_death_that_ray_tells_of_is_a_line_of_the_log(
    cluster: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Standard output is for results."""

    @ray.remote(max_retries=0)
    def dies(pid_file: str) -> None:
        Path(pid_file).write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)

    told = threading.Event()
    caplog.handler.addFilter(lambda _: told.set() or True)
    with tempfile.NamedTemporaryFile() as file:
        with pytest.raises(ray.exceptions.WorkerCrashedError):
            ray.get(dies.remote(file.name))
        assert told.wait(540)
        pid = Path(file.name).read_text()
    (line,) = [text for text in caplog.messages if text.startswith("Ray: ")]
    assert line.startswith(f"Ray: process {pid} died: ") and "\n" not in line
    assert capsys.readouterr().out == ""


def test_offloading_without_a_gpu_is_refused_at_once(cluster: str) -> None:
    scaling = ScalingConfig(num_workers=2, strategy="fsdp", cpu_offload=True)
    with pytest.raises(HardwareError, match="the workers have no GPU"):
        worker_resources(scaling, nodes())


def test_too_many_workers_are_refused_at_once(cluster: str, lab: Any) -> None:
    three = ("scaling.num_workers=3", "train.per_device_train_batch_size=3")
    config = load_config(None, [*lab.settings, *three])
    storage = Storage.open(config.storage)
    with History.open(storage.history_url) as history:
        with pytest.raises(HardwareError, match="the cluster has 2 CPUs; use at most 2 workers"):
            train_once(config, history=history, storage=storage)
        (row,) = history.trials()
    assert row.status == "failed" and "2 CPUs" in (row.error or "")


def test_a_ray_of_our_own_listens_on_loopback_and_asks_for_its_token(cluster: str) -> None:
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening, commands = [], []
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            commands.append(" ".join(process.cmdline()))
            for one in process.net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN:
                    listening.append((process.name(), one.laddr.ip.removeprefix("::ffff:")))
    assert len(listening) >= 5
    assert {ip for _, ip in listening} <= {"127.0.0.1", "::1"}, listening
    # Nor does it start what nobody here would ask: the dashboard, the autoscaler, the log monitor.
    extras = ("dashboard.py", "monitor.py")
    assert not [command for command in commands if any(extra in command for extra in extras)]

    with grpc.insecure_channel(cluster) as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")(b"", timeout=540)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_drafted_configuration_is_swept_on_a_running_cluster_which_goes_on(
    cluster: str, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lab.root)
    rows = [{"prompt": f"q {i}", "completion": f"a {i % 3}"} for i in range(40)]
    Path("mine.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    few = ("sweep.num_samples=2", "sweep.report_samples=0", "data.max_length=128")
    assert lab.rayfin_here("init", "data.path=mine.jsonl", "model.name=tiny", *few) == 0

    sweep = lab.typed("sweep", "my-sweep.yaml", "--json", "--address", cluster)
    assert sweep.end() == 0, sweep.err
    told = json.loads(sweep.out)
    data = str(Path("mine.jsonl").resolve())
    assert [trial["spec"]["data"]["path"] for trial in told["trials"]] == [data] * 2
    assert told["adapter"]["ref"] == "mine@1"
    assert [row.status for row in lab.rows()] == ["finished"] * 2
    pids = {row.scenario["worker"]["pid"] for row in lab.rows()}
    assert len(pids) == 1 and pids.pop() not in {sweep.process.pid, os.getpid()}
    assert ray.get(ray.remote(lambda: "alive").remote()) == "alive"
