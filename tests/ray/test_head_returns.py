"""A head that comes back, and keeps its state in a store outside of it: a sweep goes on."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(1200),
]

SERVER = shutil.which("redis-server") or shutil.which("valkey-server")
STEPS = 200


@pytest.fixture
def store(network: Any, lab: Any) -> Iterator[str]:
    """The address of a Redis server on a machine of its own; all machines end with the test."""
    if SERVER is None:
        pytest.skip("it needs redis-server or valkey-server on PATH")
    node = network.add("store")
    options = (f"--bind {node.address} --port 6390 --protected-mode no --save").split()
    said = lab.lines(node.run(SERVER, *options, ""))
    while "Ready to accept connections" not in (line := said.next()):
        assert line, "it has ended"
    yield f"{node.address}:6390"
    for machine in network.living:
        machine.end()


def test_a_sweep_goes_on_when_the_head_comes_back(
    network: Any, store: str, lab: Any, moment: random.Random
) -> None:
    # A head that keeps its state there, and knows within 20 s that a node is gone.
    ray = {"RAY_REDIS_ADDRESS": store, "RAY_health_check_failure_threshold": "2"}
    head = network.start_ray(network.add("head"), **ray)
    other = network.start_ray(network.add("other"), head)
    lab.environment, lab.enter = dict(other.environment), other.enter
    settings = (
        *(f"train.max_steps={STEPS}", f"train.eval_steps={STEPS // 10}", "sweep.scheduler=none"),
        *("sweep.num_samples=3", "sweep.max_concurrent_trials=1", "--address", head.ray_address),
    )
    sweep = lab.script("sweep_qlora.py", *settings)
    row = sweep.amid(finished=1, step=moment.randrange(1, STEPS * 8 // 10))
    (finished,) = (each for each in lab.rows() if each.status == "finished")
    head.end()
    # Where it runs on the other machine, it may go on without a pause.
    on_head = row.scenario["worker"]["host"] == head.name
    marked = lab.mark(row) if on_head else None
    network.start_ray(network.start_again(head), **ray)

    assert sweep.end() == 0, sweep.err
    rows = {each.trial_id: each for each in lab.rows()}
    assert [each.status for each in rows.values()] == ["finished"] * 3
    assert rows[finished.trial_id] == finished
    if on_head:
        assert lab.losses(rows[row.trial_id])[0] == marked, "it started anew"
        assert "goes on from its checkpoint" in sweep.err
    assert "Traceback" not in sweep.err
