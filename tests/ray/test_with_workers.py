"""cluster/with_workers.py, on a Ray that grows as an autoscaled one would."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.node import Node
from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.cluster_utils import Cluster
from ray.experimental.internal_kv import _internal_kv_get

SCRIPT = Path(__file__).parents[2] / "cluster" / "with_workers.py"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without what only other users of a cluster need, and what a test adds."""
    head = {"num_cpus": 1, "no_monitor": True, "include_log_monitor": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Node, "start_api_server", lambda node, **_: setattr(node, "_webui_url", ""))
        made = Cluster(initialize_head=True, connect=True, head_node_args=head)
    yield made
    ray.shutdown()
    made.shutdown()


@contextmanager
def start(processes: Any, cluster: Cluster, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command, which does not outlive the block."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | {"RAY_ADDRESS": cluster.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process
    finally:
        processes.end_family(process)


def requested() -> Any:
    return _internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.ray
def test_a_stopped_job_lets_go_of_its_workers(processes: Any, cluster: Cluster) -> None:
    with start(processes, cluster, "1", "CPU", "--", "sleep", "300") as process:
        assert line(process) == "1 of 1 times CPU=1 are there"
        process.send_signal(signal.SIGTERM)
        assert process.wait(540) == 143
        assert requested() == b"[]"


@pytest.mark.ray
def test_the_command_starts_when_the_workers_are_there(processes: Any, cluster: Cluster) -> None:
    with start(processes, cluster, "2", "CPU", "--", "sh", "-c", "echo started; exit 7") as process:
        assert line(process) == "1 of 2 times CPU=1 are there"
        assert requested() == b'[{"CPU": 1.0}, {"CPU": 1.0}]'
        cluster.add_node(num_cpus=1)
        assert line(process) == "2 of 2 times CPU=1 are there"
        assert line(process) == "started"
        assert process.wait(540) == 7
        assert requested() == b"[]"
