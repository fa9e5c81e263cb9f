"""cluster/spot_notice.py on a real node; the cloud's metadata service is a web server beside it."""

import importlib.util
import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SCRIPT = Path(__file__).parents[2] / "cluster" / "spot_notice.py"
PATIENCE = 60.0

# The nodes of a cluster, when one of them is no more.
NODES = """
import json, sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
while all(node["Alive"] for node in ray.nodes()):
    time.sleep(0.1)
print(json.dumps(ray.nodes()))
"""


def load_nodes() -> Any:
    """nodes.py: pytest imports test files only."""
    path = Path(__file__).with_name("nodes.py")
    spec = importlib.util.spec_from_file_location("rayfin_nodes_spot", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nodes = load_nodes()


@pytest.fixture
def started(lab: Any) -> Iterator[Any]:
    """Starts a Python on a node, which ends with the network."""
    with ExitStack() as stack:

        def start(node: Any, *arguments: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [*node.enter, sys.executable, "-u", *arguments],
                env=lab.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.callback(process.communicate)
            return process

        yield start


@pytest.fixture
def network(lab: Any, started: Any) -> Iterator[Any]:
    """Cables; Ray on them asks for a token."""
    if (lacking := nodes.missing()) is not None:
        pytest.skip(f"machines can't be played here, for want of {lacking}")
    lab.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    network = nodes.Network(lab.root)
    yield network
    network.end()


def test_the_notice_drains_the_node_that_it_is_for(lab: Any, network: Any, started: Any) -> None:
    head, worker = network.add("head"), network.add("worker")
    address = head.start_ray(lab.environment)
    worker.start_ray(lab.environment, head)
    page = lab.root / "cloud" / "computeMetadata" / "v1" / "instance" / "preempted"
    page.parent.mkdir(parents=True)
    page.write_text("FALSE")

    web = ("-m", "http.server", "8000", "--bind", "127.0.0.1", "--directory")
    server = started(worker, *web, str(lab.root / "cloud"))
    assert "Serving HTTP" in server.stdout.readline()
    service = ("--service", "http://127.0.0.1:8000", "--pause", "0.1")
    watcher = started(worker, str(SCRIPT), "gcp", "--address", address, *service)
    for _ in range(2):
        assert "preempted" in server.stdout.readline()
    assert watcher.poll() is None

    (notice := page.with_name("notice")).write_text("TRUE")
    notice.replace(page)
    said, _ = watcher.communicate(timeout=PATIENCE)
    assert watcher.returncode == 0, said
    answer, _ = started(head, "-c", NODES, address).communicate(timeout=PATIENCE)
    found = {each["NodeManagerAddress"]: each for each in json.loads(answer.splitlines()[-1])}
    assert found[head.address]["Alive"]
    lost = found[worker.address]
    assert f"draining node {lost['NodeID']}" in said
    assert "the cloud takes this spot machine away" in lost["DeathReasonMessage"]
