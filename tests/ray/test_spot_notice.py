"""cluster/spot_notice.py on a real node; the cloud's metadata service is a web server beside it."""

from __future__ import annotations

import json
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


def test_the_notice_drains_the_node_that_it_is_for(lab: Any, network: Any) -> None:
    head, worker = network.add("head"), network.add("worker")
    address = head.start_ray(lab.environment)
    worker.start_ray(lab.environment, head)
    page = lab.root / "cloud" / "computeMetadata" / "v1" / "instance" / "preempted"
    page.parent.mkdir(parents=True)
    page.write_text("FALSE")

    web = ("-m", "http.server", "8000", "--bind", "127.0.0.1", "--directory")
    server = worker.python(lab.environment, *web, str(lab.root / "cloud"))
    assert "Serving HTTP" in server.stdout.readline()
    service = ("--service", "http://127.0.0.1:8000", "--pause", "0.1")
    watcher = worker.python(lab.environment, str(SCRIPT), "gcp", "--address", address, *service)
    for _ in range(2):
        assert "preempted" in server.stdout.readline()
    assert watcher.poll() is None

    (notice := page.with_name("notice")).write_text("TRUE")
    notice.replace(page)
    said, _ = watcher.communicate(timeout=PATIENCE)
    assert watcher.returncode == 0, said
    asking = head.python(lab.environment, "-c", NODES, address)
    answer, _ = asking.communicate(timeout=PATIENCE)
    found = {each["NodeManagerAddress"]: each for each in json.loads(answer.splitlines()[-1])}
    assert found[head.address]["Alive"]
    lost = found[worker.address]
    assert f"draining node {lost['NodeID']}" in said
    assert "the cloud takes this spot machine away" in lost["DeathReasonMessage"]
