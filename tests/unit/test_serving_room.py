"""A deployment for which the cluster has no room: Serve would wait for it, and say nothing."""

from __future__ import annotations

import pytest

from rayfin.config import load_serve_config
from rayfin.errors import HardwareError


# Serve's own models, when they are imported.
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")
def test_engines_that_the_cluster_has_no_room_for_are_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rayfin.serving import deployment

    monkeypatch.setattr(deployment.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(deployment, "nodes", lambda: [{"CPU": 2.0}])
    two = load_serve_config({}, ["deployment.replicas=2", "deployment.cpus=1"])
    assert deployment.engine_resources(two) == {"num_cpus": 1.0, "num_gpus": 0.0}
    three = load_serve_config({}, ["deployment.replicas=3", "deployment.cpus=1"])
    with pytest.raises(HardwareError, match="the cluster has 2 CPUs and 0 GPUs; lower"):
        deployment.engine_resources(three)
