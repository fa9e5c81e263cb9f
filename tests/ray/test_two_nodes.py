"""A cluster of machines that namespaces play: trials on two of them, and machines are lost."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rayfin.config import load_config
from rayfin.history import TrialRecord
from rayfin.paths import StoragePath
from rayfin.training import TrialSpec
from rayfin.training.trial import run_trial

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

# A node that falls silent is given up after two checks of 10 s, not five: see docs/distributed.md.
HEAD = {"RAY_health_check_failure_threshold": "2"}
PATIENCE = 540.0
CONTROLLER = "ray::TrainController"
BUCKET = "s3://rayfin-test"
SPOT_NOTICE = Path(__file__).parents[2] / "cluster" / "spot_notice.py"

# Answers by lines, and at once: a command that has to load Ray first would come seconds later.
ANSWER = """
import importlib.util, sys, time
from types import SimpleNamespace
import ray
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION
spec = importlib.util.spec_from_file_location("laboratory", sys.argv[1])
laboratory = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = laboratory
spec.loader.exec_module(laboratory)
ray.init(address=sys.argv[2], log_to_driver=False, logging_level="ERROR")
gcs = GcsClient(address=sys.argv[2])
def warn(address):
    ids = {each.node_manager_address: key for key, each in gcs.get_all_node_info().items()}
    deadline = (time.time_ns() + 540 * 10**9) // 10**6
    reason = (DRAIN_NODE_REASON_PREEMPTION, "a spot machine", deadline)
    return gcs.drain_node(ids[address].hex(), *reason)
def hold(address):
    global held
    held = ray.util.placement_group([{"CPU": 1, f"node:{address}": 0.01}])
    return held.wait(540)
def let_go(_):
    ray.util.remove_placement_group(held)
print("answer: ready")
for line in sys.stdin:
    what, of = line.split()
    if what in ("warn", "hold", "let_go"):
        answer = globals()[what](of)
    else:
        answer = getattr(laboratory.Lab, what)(SimpleNamespace(directory=of))
    print("answer:", answer)
"""

# The nodes of a cluster, when one of them is no more.
NODES = """
import json, sys, time, ray
from ray._private.state import state
ray.init(address=sys.argv[1], log_to_driver=False)
while next(node["Alive"] for node in ray.nodes() if node["NodeManagerAddress"] == sys.argv[2]):
    time.sleep(0.1)
print(json.dumps(ray.nodes()))
"""

# `rayfin` that waits seconds, and not twenty minutes, for another node.
IMPATIENT = """
from rayfin.cli import main
from rayfin.tuning import lost_nodes
lost_nodes._EVERY, lost_nodes._PATIENCE = 1.0, 5.0
raise SystemExit(main())
"""


class Cluster:
    """A head and further machines; each has one CPU."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.head = network.start_ray(network.add("head"), **HEAD)
        self.address = self.head.ray_address
        self._further: list[Any] = []

    def plug_in(self) -> Any:
        """Add a machine."""
        name = f"machine{len(self.network.nodes)}"
        self._further.append(self.network.start_ray(self.network.add(name), self.head))
        return self._further[-1]

    @property
    def further(self) -> Any:
        """A machine beside the head; a new one where the others were lost."""
        found = [node for node in self._further if node.lives]
        return found[0] if found else self.plug_in()


class Clusters:
    """The module's cluster, and another in its place when it is not whole any more."""

    def __init__(self, network: Any) -> None:
        self._network = network
        self._others = network.living  # which belong to no cluster
        self._now: Cluster | None = None

    def whole(self) -> Cluster:
        """Return a cluster whose head lives, and which no failed test has left behind."""
        if self._now is None or not self._now.head.lives:
            self.end()
            self._now = Cluster(self._network)
        return self._now

    def end(self) -> None:
        """End its machines, and those that a failure left half-made."""
        self._now = None
        for node in reversed(self._network.living):
            if node not in self._others:
                node.end()


class OnHead:
    """A process on the head: it reaches the bucket and Ray, which only the machines do."""

    def __init__(self, cluster: Cluster, lab: Any) -> None:
        arguments = (str(Path(__file__).with_name("conftest.py")), cluster.address)
        self.process = cluster.head.python("-c", ANSWER, *arguments)
        self._lines = lab.lines(self.process)
        assert self._answer() == "ready"

    def saved(self, row: TrialRecord) -> int:
        return int(self._ask(f"saved {row.directory}"))

    def mark(self, row: TrialRecord) -> float:
        return float(self._ask(f"mark {row.directory}"))

    def warn(self, node: Any) -> None:
        """Has Ray know that a machine is to be taken away, as `cluster/spot_notice.py` does."""
        assert self._ask(f"warn {node.address}") == "(True, '')"

    def hold(self, node: Any) -> None:
        """Takes a machine's CPU, so that others get the work."""
        assert self._ask(f"hold {node.address}") == "True"

    def let_go(self) -> None:
        self._ask("let_go it")

    def _ask(self, question: str) -> str:
        self.process.stdin.write(f"{question}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        said = ""
        while line := self._lines.next():
            if line.startswith("answer: "):
                return str(line).removeprefix("answer: ").strip()
            said += line
        raise RuntimeError(said)


@pytest.fixture(scope="module")
def clusters(network: Any, s3_elsewhere: Any) -> Iterator[Clusters]:
    """The bucket is on a machine of its own, which outlives any cluster."""
    store = network.add("store")
    with s3_elsewhere(*store.enter, address=store.address) as server:
        network.lab.environment.update(server)
        yield Clusters(network)


@pytest.fixture
def cluster(clusters: Clusters, lab: Any, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The laboratory's commands are typed on the head.

    Nobody knows what a failed test has left: its cluster is not the next one's.
    """
    failed = request.session.testsfailed
    cluster = clusters.whole()
    type_on(cluster.head, lab)
    yield cluster
    if request.session.testsfailed > failed:
        clusters.end()


@pytest.fixture
def on_head(cluster: Cluster, lab: Any) -> Iterator[OnHead]:
    found = OnHead(cluster, lab)
    yield found
    lab.end_family(found.process)


def type_on(node: Any, lab: Any) -> None:
    lab.environment, lab.enter = dict(node.environment), node.enter


def test_the_clouds_notice_drains_the_machine_that_it_is_for(cluster: Cluster, lab: Any) -> None:
    """The cloud's metadata service is a web server beside it."""
    lost = cluster.further
    page = lab.root / "cloud" / "computeMetadata" / "v1" / "instance" / "preempted"
    page.parent.mkdir(parents=True)
    page.write_text("FALSE")
    web = ("-m", "http.server", "8000", "--bind", "127.0.0.1", "--directory")
    served = lab.lines(lost.python(*web, str(lab.root / "cloud")))
    assert "Serving HTTP" in served.next()
    service = ("--service", "http://127.0.0.1:8000", "--pause", "0.1")
    watcher = lost.python(str(SPOT_NOTICE), "gcp", "--address", cluster.address, *service)
    for _ in range(2):
        assert "preempted" in served.next()
    assert watcher.poll() is None

    (notice := page.with_name("notice")).write_text("TRUE")
    notice.replace(page)
    said, _ = watcher.communicate(timeout=PATIENCE)
    assert watcher.returncode == 0, said
    asking = cluster.head.python("-c", NODES, cluster.address, lost.address)
    answer, _ = asking.communicate(timeout=PATIENCE)
    found = {each["NodeManagerAddress"]: each for each in json.loads(answer.splitlines()[-1])}
    assert found[cluster.head.address]["Alive"]
    node = found[lost.address]
    assert f"draining node {node['NodeID']}" in said
    assert "the cloud takes this spot machine away" in node["DeathReasonMessage"]
    lost.end()


def test_two_workers_on_two_nodes_compute_what_one_process_does_though_one_node_is_lost(
    cluster: Cluster, lab: Any
) -> None:
    """Without a common disk: what they write goes into a bucket.

    The group waits for another node longer than Ray Train does, and with no attempt of the trial's
    spent on it.
    """
    lost = cluster.further
    lab.environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "10"  # rayfin's own: 30
    bucket = lab.in_bucket(f"{BUCKET}/group")
    settings = ("train.max_steps=48", "train.eval_steps=8", "sweep.max_failures=1", *bucket)
    published = ("publish.name=both", f"publish.storage={lab.root}")
    words = (*settings, *published, "scaling.num_workers=2", "--address", cluster.address)
    training = lab.rayfin("train", *words)
    config = load_config(None, [*lab.settings, *settings])
    one = run_trial(TrialSpec.of(config), lambda _: None, location=StoragePath(lab.root / "one"))

    def one_on_each() -> bool:
        nodes = (cluster.head, lost)
        return all(len(node.processes("ray::RayTrainWorker")) == 1 for node in nodes)

    training.until(one_on_each)
    training.until(lambda: any(row.curve and row.curve[-1]["step"] >= 16 for row in lab.rows()))
    began = {process.pid for process in cluster.head.processes(CONTROLLER)}
    lost.end()

    def gave_up() -> bool:
        """Whether one controller has seen the loss, and one has waited in vain."""
        began.update(process.pid for process in cluster.head.processes(CONTROLLER))
        return len(began) == 3

    training.until(gave_up)
    cluster.plug_in()
    assert training.end(bound=600) == 0, training.out + training.err
    assert "no room for 2 workers on the cluster; waiting" in training.err
    assert "waiting 20 minutes for another" in training.err
    told = training.out + training.err
    steps = [int(step) for step in re.findall(r"^step (\d+)/48 ", told, re.MULTILINE)]
    assert steps == sorted(steps) and steps.count(8) == 1, "it started anew"
    (row,) = lab.rows()
    assert row.status == "finished" and row.scenario["hardware"]["num_workers"] == 2
    for mine, other in zip(row.curve, one.curve, strict=True):
        losses = [(mine[name], other[name]) for name in mine if name.endswith("loss")]
        assert losses and all(a == pytest.approx(b, rel=1e-3) for a, b in losses)
    assert row.curve[-1]["step"] == 48
    again = lab.rayfin("train", *settings, *published, "scaling.num_workers=2")
    assert again.end() == 0, again.out + again.err
    assert "already in the history" in again.out + again.err
    # The adapter that is published is fetched from the bucket.
    found = load_file(lab.root / "adapters" / "both" / "1" / "adapter_model.safetensors")
    assert one.adapter is not None
    for name, weight in load_file(one.adapter.path / "adapter_model.safetensors").items():
        assert (weight - found[name]).abs().max() < 1e-3, name


@pytest.mark.patient
def test_a_group_that_is_warned_of_losing_a_node_saves_and_goes_on_elsewhere(
    cluster: Cluster, on_head: OnHead, lab: Any
) -> None:
    ours = [cluster.further, cluster.plug_in()]
    # No checkpoint but the one that the warning asks for.
    settings = ("train.max_steps=1200", "train.eval_steps=60", "train.save_steps=1200")
    training = lab.rayfin("train", *settings, "scaling.num_workers=2", "--address", cluster.address)
    training.until(lambda: any(row.curve for row in lab.rows()))
    (row,) = lab.rows()
    assert not lab.checkpoints(row)
    lost = next(node for node in ours if node.processes("ray::RayTrainWorker"))
    on_head.warn(lost)
    training.until(lambda: lab.checkpoints(row))
    marked = lab.mark(row)
    lost.end()

    assert training.end(bound=600) == 0, training.out + training.err
    (row,) = lab.rows()
    assert row.status == "finished" and row.curve[-1]["step"] == 1200
    assert lab.losses(row)[0] == marked, "it started anew, and not from its checkpoint"


def test_a_sweep_outlives_a_node_that_is_taken_away_and_one_that_falls_silent(
    cluster: Cluster, on_head: OnHead, lab: Any, moment: random.Random
) -> None:
    """Two trials at a time on three nodes, which write into a bucket."""
    last, regular = 300, 127
    ours = {node.name: node for node in (cluster.further, cluster.plug_in())}
    settings = (
        *(f"train.max_steps={last}", "train.eval_steps=10", f"train.save_steps={regular}"),
        *("sweep.num_samples=3", "sweep.max_concurrent_trials=2", "sweep.scheduler=none"),
        *lab.in_bucket(f"{BUCKET}/sweep"),
        *("publish.name=best", f"publish.storage={lab.root}"),
    )
    on_head.hold(cluster.head)  # at first, trials are on the others
    sweep = lab.script("sweep_qlora.py", *settings, "--address", cluster.address)

    # A warning: a checkpoint is there that is none of the configuration's.
    warned = sweep.until(lambda: running(lab, *ours))
    away = ours.pop(host_of(warned))
    on_head.warn(away)
    sweep.until(lambda: on_head.saved(warned) % regular)
    away.end()
    marked = on_head.mark(warned)
    on_head.let_go()

    # Silence: the other is cut off amid a trial that has saved.
    (silent,) = ours.values()
    beyond = moment.randrange(1, last * 6 // 10)

    def lose() -> TrialRecord | None:
        found = running(lab, silent.name, step=beyond)
        return found if found is not None and on_head.saved(found) else None

    lost = sweep.until(lose)
    silent.cut()
    assert silent.processes("ray::"), "it is the network that is gone, and not the node"
    again = lost if lost.trial_id == warned.trial_id else None
    assert on_head.mark(lost) == marked
    # Two trials are left to the head's one CPU, when it has noticed.
    assert sweep.end(bound=900) == 0, sweep.err
    silent.end()

    rows = {row.trial_id: row for row in lab.rows()}
    assert [row.status for row in rows.values()] == ["finished"] * 3
    assert len({row.fingerprint for row in rows.values()}) == len(rows)
    assert all(row.curve[-1]["step"] == last for row in rows.values())
    ends = Counter(re.findall(r"trial (\d)/3 finished", sweep.err))
    assert ends == dict.fromkeys("123", 1), "a trial was finished twice"
    assert "Traceback" not in sweep.err and "goes on from its checkpoint" in sweep.err
    assert host_of(rows[lost.trial_id]) == cluster.head.name
    again = again or rows[warned.trial_id]
    assert host_of(again) != away.name
    for row in (again, rows[lost.trial_id]):
        assert lab.losses(row)[0] == marked, "it started anew, and not from its checkpoint"
    assert (lab.root / "adapters" / "best" / "1" / "adapter_model.safetensors").is_file()


@pytest.mark.long
def test_a_sweep_whose_node_does_not_come_back_ends_and_goes_on_with_another(
    cluster: Cluster, lab: Any
) -> None:
    """Each trial takes both machines; only the waiting is shorter than a user's."""
    lost = cluster.further
    settings = (
        *("train.max_steps=40", "train.eval_steps=4", "scaling.num_workers=2"),
        *("sweep.parameters.method.r=[4,8]", "sweep.num_samples=2", "sweep.scheduler=none"),
        *lab.in_bucket(f"{BUCKET}/stranded"),
    )
    words = ("sweep", *lab.settings, *settings, "--address", cluster.address)
    sweep = lab.program(IMPATIENT, *words)

    def second_runs() -> bool:
        rows = lab.rows()
        return len(rows) == 2 and rows[0].status == "finished" and len(rows[1].curve) > 0

    sweep.until(second_runs)
    lost.end()
    assert sweep.end() == 2, sweep.out + sweep.err
    told = [line for line in sweep.err.splitlines() if line.startswith("rayfin: ")]
    assert len(told) == 1 and "Traceback" not in sweep.err, sweep.err
    assert "the cluster has lost the nodes that can hold a trial (2 times 1 CPU" in told[0]
    assert "start a node and go on with --resume" in told[0]
    finished, waiting = lab.rows()
    assert (finished.status, waiting.status) == ("finished", "interrupted")

    cluster.plug_in()
    again = lab.rayfin("sweep", *settings, "--address", cluster.address, "--resume")
    assert again.end() == 0, again.out + again.err
    assert [row.status for row in lab.rows()] == ["finished"] * 2
    assert lab.rows()[0] == finished


@pytest.mark.long
def test_a_sweep_whose_head_is_lost_ends_and_goes_on_under_another(
    cluster: Cluster, lab: Any, moment: random.Random
) -> None:
    """The driver is on the other machine: nobody ends it, and nobody answers it any more."""
    steps = 200
    settings = (
        *(f"train.max_steps={steps}", f"train.eval_steps={steps // 10}", "sweep.scheduler=none"),
        *("sweep.num_samples=3", "sweep.max_concurrent_trials=1"),
    )
    other = cluster.further
    type_on(other, lab)
    lab.environment["RAY_gcs_rpc_server_reconnect_timeout_s"] = "15"  # Ray's own: 60
    sweep = lab.script("sweep_qlora.py", *settings, "--address", cluster.address)
    row = sweep.amid(finished=1, step=moment.randrange(1, steps // 2))
    cluster.head.end()
    assert sweep.end() not in (0, None)
    before = {each.trial_id: each for each in lab.rows()}
    # Where it ran beside the driver, it may have gone on to its end without a head.
    unfinished = before[row.trial_id].status != "finished"
    marked = lab.mark(row) if unfinished else None
    other.end()

    # By a Ray of this machine's own.
    assert lab.script_here("sweep_qlora.py", *settings, "--resume") == 0
    rows = {each.trial_id: each for each in lab.rows()}
    assert [each.status for each in rows.values()] == ["finished"] * 3
    for trial_id, old in before.items():
        assert old.status != "finished" or rows[trial_id] == old, "it was finished before"
    if unfinished:
        losses = lab.losses(rows[row.trial_id])
        assert losses[0] == marked, "it started anew, and not from its checkpoint"


def running(lab: Any, *hosts: str, step: int = 1) -> TrialRecord | None:
    """A trial that runs on one of those machines and has evaluated that step."""
    for row in lab.rows():
        reached = row.curve[-1]["step"] if row.curve else 0
        if row.status == "running" and host_of(row) in hosts and reached >= step:
            return row
    return None


def host_of(row: TrialRecord) -> str | None:
    found: str | None = row.scenario.get("worker", {}).get("host")
    return found
