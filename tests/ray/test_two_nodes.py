"""A cluster of two machines, played by namespaces: trials on both, and one machine is lost."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from safetensors.torch import load_file

from rayfin.config import load_config
from rayfin.history import TrialRecord
from rayfin.paths import Place
from rayfin.training import TrialSpec
from rayfin.training.trial import run_trial

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# A node that falls silent is given up after two checks of 10 s, not five: see docs/distributed.md.
HEAD = {"RAY_health_check_failure_threshold": "2"}
SECONDS = 150.0
"""The bound: so long after the head was lost a sweep has ended."""
CONTROLLER = "ray::TrainController"
STEPS = 200
LONG = (f"train.max_steps={STEPS}", f"train.eval_steps={STEPS // 10}", "sweep.scheduler=none")


class Cluster:
    """Two machines of one CPU each, an S3 server on the first."""

    def __init__(self, network: Any, lab: Any, servers: Any, stack: ExitStack) -> None:
        self.head, self.worker = network.add("head"), network.add("worker")
        server = servers(*self.head.enter, address=self.head.address)
        lab.environment |= stack.enter_context(server) | lab.disk("head")
        own = lab.disk("worker")
        self.head.hide(lab.root / "worker")
        self.worker.hide(lab.root / "head")
        self.address = self.head.start_ray(lab.environment | HEAD)
        self.worker.start_ray(lab.environment | own, self.head)


@pytest.fixture
def cluster(lab: Any, network: Any, s3_elsewhere: Any) -> Iterator[Cluster]:
    """The laboratory's commands are typed on the head."""
    with ExitStack() as stack:
        found = Cluster(network, lab, s3_elsewhere, stack)
        lab.enter = found.head.enter
        yield found


def test_two_workers_on_two_nodes_compute_what_one_process_does(cluster: Cluster, lab: Any) -> None:
    """Without a common disk: what they write goes into a bucket."""
    bucket = lab.in_bucket("s3://rayfin-test/runs")
    settings = ("train.max_steps=12", "train.eval_steps=4", *bucket)
    config = load_config(None, [*lab.settings, *settings])
    one = run_trial(TrialSpec.of(config), lambda _: None, place=Place(lab.root / "one"))

    training = lab.rayfin("train", *settings, "scaling.num_workers=2", "--address", cluster.address)

    def one_on_each() -> bool:
        nodes = (cluster.head, cluster.worker)
        return all(len(node.processes("ray::RayTrainWorker")) == 1 for node in nodes)

    training.until(one_on_each)
    assert training.end() == 0, training.out + training.err
    (row,) = lab.rows()
    assert row.status == "finished" and row.scenario["hardware"]["num_workers"] == 2
    for mine, other in zip(row.curve, one.curve, strict=True):
        losses = [(mine[name], other[name]) for name in mine if name.endswith("loss")]
        assert losses and all(a == pytest.approx(b, rel=1e-3) for a, b in losses)
    assert row.curve[-1]["step"] == 12
    # Answered from the history, it is published: the adapter is fetched from the bucket.
    published = ("publish.name=both", f"publish.storage={lab.root}")
    again = lab.rayfin("train", *settings, *published, "scaling.num_workers=2")
    assert again.end() == 0, again.out + again.err
    assert "already in the history" in again.out + again.err
    found = load_file(lab.root / "adapters" / "both" / "1" / "adapter_model.safetensors")
    assert one.adapter is not None
    for name, weight in load_file(one.adapter.path / "adapter_model.safetensors").items():
        assert (weight - found[name]).abs().max() < 1e-3, name

    two = ("sweep.num_samples=2", "sweep.max_concurrent_trials=2", "sweep.scheduler=none")
    sweep = lab.script("sweep_qlora.py", *settings, *two, *published, "--address", cluster.address)
    assert sweep.end() == 0, sweep.out + sweep.err
    rows = [row for row in lab.rows() if row.sweep_id != "train"]
    assert [row.status for row in rows] == ["finished"] * 2
    assert {row.scenario["worker"]["host"] for row in rows} == {"head", "worker"}


@pytest.mark.patient
def test_a_group_that_is_warned_of_losing_a_node_saves_and_goes_on_elsewhere(
    cluster: Cluster, network: Any, lab: Any
) -> None:
    spare = network.add("spare")
    spare.start_ray(lab.environment, cluster.head)
    # No checkpoint but the one that the warning asks for.
    settings = ("train.max_steps=1200", "train.eval_steps=60", "train.save_steps=1200")
    training = lab.rayfin("train", *settings, "scaling.num_workers=2", "--address", cluster.address)
    training.until(lambda: any(row.curve for row in lab.rows()))
    (row,) = lab.rows()
    assert not lab.checkpoints(row)
    lost = next(n for n in (cluster.worker, spare) if n.processes("ray::RayTrainWorker"))
    lost.warn(lab.environment, cluster.head)
    training.until(lambda: lab.checkpoints(row))
    marked = lab.mark(row)
    lost.end()

    assert training.end() == 0, training.out + training.err
    (row,) = lab.rows()
    assert row.status == "finished" and row.curve[-1]["step"] == 1200
    assert lab.losses(row)[0] == marked, "it started anew, and not from its checkpoint"


def test_a_group_that_loses_a_node_waits_for_another(
    cluster: Cluster, network: Any, lab: Any
) -> None:
    """Longer than Ray Train does, and with no attempt of the trial's spent on it."""
    settings = ("train.max_steps=200", "train.eval_steps=10", "sweep.max_failures=1")
    training = lab.rayfin("train", *settings, "scaling.num_workers=2", "--address", cluster.address)
    row = training.until(lambda: next((r for r in lab.rows() if lab.saved(r) >= 20), None))
    began = {process.pid for process in cluster.head.processes(CONTROLLER)}
    cluster.worker.end()

    def gave_up() -> bool:
        """Whether one controller has seen the loss, and one has waited in vain."""
        began.update(process.pid for process in cluster.head.processes(CONTROLLER))
        return len(began) == 3

    training.until(gave_up)
    marked = lab.mark(row)
    network.add("spare").start_ray(lab.environment, cluster.head)
    assert training.end() == 0, training.out + training.err
    (row,) = lab.rows()
    assert row.status == "finished" and row.curve[-1]["step"] == 200
    assert lab.losses(row)[0] == marked, "it started anew, and not from its checkpoint"
    assert "no room for 2 workers on the cluster; waiting" in training.err
    assert "waiting 20 minutes for another" in training.err


def test_a_trial_that_is_warned_of_losing_its_node_saves_and_goes_on_elsewhere(
    cluster: Cluster, lab: Any
) -> None:
    """No checkpoint is there but the one that the warning asks for."""
    sweep = lab.script(
        "sweep_qlora.py",
        *("train.max_steps=600", "train.eval_steps=10", "train.save_steps=600"),
        *("sweep.num_samples=2", "sweep.max_concurrent_trials=2", "sweep.scheduler=none"),
        *("--address", cluster.address),
    )
    warned = sweep.until(
        lambda: next((r for r in lab.rows() if r.curve and host_of(r) == "worker"), None)
    )
    assert not lab.checkpoints(warned)
    cluster.worker.warn(lab.environment, cluster.head)
    sweep.until(lambda: lab.checkpoints(warned))
    marked = lab.mark(warned)
    cluster.worker.end()
    assert sweep.end() == 0, sweep.err
    rows = lab.rows()
    assert [row.status for row in rows] == ["finished"] * 2
    (again,) = [row for row in rows if row.trial_id == warned.trial_id]
    assert host_of(again) == "head" and again.curve[-1]["step"] == 600
    assert lab.losses(again)[0] == marked, "it started anew, and not from its checkpoint"


def test_a_sweep_on_two_nodes_outlives_one(
    cluster: Cluster, lab: Any, moment: random.Random
) -> None:
    settings = (*LONG, "sweep.num_samples=6", "sweep.max_concurrent_trials=2")
    sweep = lab.script("sweep_qlora.py", *settings, "--address", cluster.address)
    step = moment.randrange(1, STEPS * 8 // 10)
    lost = sweep.until(lambda: on_host(lab, "worker", step))
    done = finished(lab)
    cluster.worker.cut()
    # By then the lost one waits for an answer to its report, and saves nothing more.
    sweep.until(lambda: finished(lab) > done)
    assert cluster.worker.processes("ray::"), "it is the network that is gone, and not the node"
    marked = lab.mark(lost)
    cluster.worker.end()
    assert sweep.end() == 0, sweep.err

    rows = lab.rows()
    assert [row.status for row in rows] == ["finished"] * 6
    assert len({row.fingerprint for row in rows}) == len({row.trial_id for row in rows}) == 6
    ends = Counter(re.findall(r"trial (\d)/6 finished", sweep.err))
    assert ends == dict.fromkeys("123456", 1), "a trial was finished twice"
    assert "Traceback" not in sweep.err and "goes on from its checkpoint" in sweep.err
    (again,) = [row for row in rows if row.trial_id == lost.trial_id]
    assert again.scenario["worker"]["host"] == "head"
    assert lab.losses(again)[0] == marked, "it started anew, and not from its checkpoint"
    assert again.curve[-1]["step"] == STEPS


def test_a_sweep_whose_head_is_lost_ends_and_goes_on_under_another(
    cluster: Cluster, network: Any, lab: Any, moment: random.Random
) -> None:
    """The driver is on the other machine: nobody ends it, and nobody answers it any more."""
    settings = (*LONG, "sweep.num_samples=3", "sweep.max_concurrent_trials=1")
    lab.enter = cluster.worker.enter
    sweep = lab.script("sweep_qlora.py", *settings, "--address", cluster.address)
    row = sweep.amid(finished=1, step=moment.randrange(1, STEPS * 8 // 10))
    cluster.head.end()
    lost = time.monotonic()
    assert sweep.end() not in (0, None)
    assert time.monotonic() - lost < SECONDS, sweep.err
    before = {each.trial_id: each for each in lab.rows()}
    # Where it ran beside the driver, it may have gone on to its end without a head.
    running = before[row.trial_id].status == "running"
    marked = lab.mark(row) if running else None
    cluster.worker.end()

    head = network.add("head2")
    lab.enter = head.enter
    again = lab.script(
        "sweep_qlora.py", *settings, "--resume", "--address", head.start_ray(lab.environment)
    )
    assert again.end() == 0, again.err
    rows = {each.trial_id: each for each in lab.rows()}
    assert [each.status for each in rows.values()] == ["finished"] * 3
    for trial_id, old in before.items():
        assert old.status != "finished" or rows[trial_id] == old, "it was finished before"
    if running:
        losses = lab.losses(rows[row.trial_id])
        assert losses[0] == marked, "it started anew, and not from its checkpoint"


def on_host(lab: Any, host: str, step: int) -> TrialRecord | None:
    """A trial that runs on that machine and has saved that step."""
    for row in lab.rows():
        if row.status == "running" and host_of(row) == host and lab.saved(row) >= step:
            return row
    return None


def host_of(row: TrialRecord) -> str | None:
    found: str | None = row.scenario.get("worker", {}).get("host")
    return found


def finished(lab: Any) -> int:
    return sum(row.status == "finished" for row in lab.rows())
