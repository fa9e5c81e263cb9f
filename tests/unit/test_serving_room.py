"""Where the engines of a deployment run: Serve would wait for what isn't there, and say nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayfin.config import load_serve_config
from rayfin.errors import ConfigError, HardwareError

# Serve's own models, when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")

GPUS: list[dict[str, float]] = [{"CPU": 8.0, "GPU": 1.0}] * 2


def place(
    settings: str, nodes: list[dict[str, float]], free: Any = None, may_grow: bool = False
) -> Any:
    """`settings`: of the deployment, by their short names."""
    from rayfin.serving import placement

    named = [f"deployment.{each}" for each in settings.split() if not each.startswith("engine.")]
    named += [each for each in settings.split() if each.startswith("engine.")]
    cluster = placement.Cluster(nodes, free, may_grow)
    return placement.place(load_serve_config({}, named), cluster)


def refused(settings: str, nodes: list[dict[str, float]], **cluster: Any) -> str:
    with pytest.raises(HardwareError) as caught:
        place(settings, nodes, **cluster)
    return str(caught.value)


def test_engines_that_the_cluster_has_no_room_for_are_refused_at_once() -> None:
    two = place("replicas=2 cpus=1", [{"CPU": 2.0}])
    assert two.options == {"num_cpus": 1.0, "num_gpus": 0.0}
    error = refused("replicas=3 cpus=1", [{"CPU": 2.0}])
    assert "the cluster has 2 CPUs and 0 GPUs; lower" in error


def test_the_gpus_that_are_needed_are_those_of_the_engines_at_the_start() -> None:
    growing = place("replicas=2 max_replicas=8", GPUS)
    assert (growing.gpus, growing.cpus) == (1.0, 8.0)
    (note,) = growing.notes
    assert "has room for 2 of deployment.max_replicas=8 engines with 8 CPUs and 1 GPU each" in note
    assert place("replicas=1 max_replicas=2", GPUS).notes == ()


def test_a_cluster_without_a_gpu_serves_on_the_cpu() -> None:
    plain = place("replicas=2", [{"CPU": 4.0}])
    assert (plain.gpus, plain.cpus, plain.notes) == (0.0, 2.0, ())
    (note,) = place("engine.type=vllm", [{"CPU": 4.0}]).notes
    assert "runs on the CPU" in note and "has no GPU" in note


@pytest.mark.parametrize(
    ("settings", "remedies"),
    [
        ("replicas=3", ["replicas=2", "gpus=0.5", "gpus=0"]),
        ("replicas=5 max_replicas=9", ["replicas=2", "gpus=0.33", "gpus=0"]),
        ("replicas=1 engine.vllm.tensor_parallel_size=2 engine.type=vllm", ["gpus=0"]),
    ],
)
def test_fewer_gpus_than_engines_are_refused_with_what_would_do(
    settings: str, remedies: list[str]
) -> None:
    error = refused(settings, GPUS)
    assert "and the cluster has 2 GPUs; use" in error
    assert re.findall(r"deployment\.(\w+=[\d.]+) (?:or|\()|$", error)[: len(remedies)] == remedies
    for remedy in remedies:
        place(f"{settings} {remedy}", GPUS)


def test_a_gpu_that_is_asked_for_and_not_there_is_refused_at_once() -> None:
    error = refused("gpus=1", [{"CPU": 4.0}])
    assert "deployment.gpus=1, and the cluster has no GPU; use deployment.gpus=0" in error
    assert "engine.vllm has each engine compute on 2; use deployment.gpus=2" in refused(
        "gpus=1 engine.type=vllm engine.vllm.tensor_parallel_size=2", GPUS
    )
    assert place(
        "engine.type=vllm engine.vllm.tensor_parallel_size=2", [{"CPU": 4.0, "GPU": 2.0}]
    ).gpus == 2.0  # fmt: skip


def test_a_part_of_a_gpu_is_never_parts_of_two() -> None:
    """Two GPUs hold four times 0.4 of one, not five times, and Ray would wait for the fifth."""
    assert place("replicas=4 gpus=0.4", [{"CPU": 8.0, "GPU": 2.0}]).gpus == 0.4
    assert "don't fit" in refused("replicas=5 gpus=0.4", [{"CPU": 8.0, "GPU": 2.0}])
    with pytest.raises(ConfigError, match=r"gpus=1\.5.*whole"):
        load_serve_config({}, ["deployment.gpus=1.5"])


@pytest.mark.parametrize("gpus", ["auto", "1"])
def test_gpus_that_others_hold_are_not_waited_for(gpus: str) -> None:
    free = {"CPU": 16.0, "GPU": 1.0}
    error = refused(f"replicas=2 gpus={gpus}", GPUS, free=free)
    assert "take 1 GPU each, and 1 of 2 are free" in error and "deployment.gpus=0" in error
    assert "0 of 2 are free" in refused("gpus=1", GPUS, free={"CPU": 16.0})  # as Ray says none
    assert place("replicas=2 gpus=0", GPUS, free=free).gpus == 0.0
    assert place("replicas=2", GPUS).gpus == 1.0, "a deployment that is updated holds them itself"
    assert "take 4 CPUs each, and 1 of 4 are free" in refused(
        "gpus=0 cpus=4", [{"CPU": 4.0}], free={"CPU": 1.0}
    )


def test_what_serve_was_told_to_keep_up_waits_for_nodes_and_says_so() -> None:
    """By a file for Serve's own commands, as KubeRay's: its workers come after the head."""
    head = [{"CPU": 2.0}]
    coming = place("replicas=2 gpus=1", head, free={}, may_grow=True)
    assert coming.options == {"num_cpus": 1.0, "num_gpus": 1.0}
    (note,) = coming.notes
    assert "has room for 0 of deployment.replicas=2 engines with 1 CPU and 1 GPU each" in note
    (note,) = place("", head, may_grow=True).notes
    assert "runs on the CPU, as the cluster has no GPU; where one is to come" in note
    some = place("replicas=3", GPUS, may_grow=True)
    assert some.gpus == 1.0 and "room for 2 of deployment.replicas=3" in some.notes[0]


def test_what_others_just_let_go_of_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from rayfin.serving import placement

    looks: Iterator[dict[str, float]] = iter([{}, {"CPU": 1.0}, {"CPU": 4.0}])
    monkeypatch.setattr(placement.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(placement, "nodes", lambda: [{"CPU": 4.0}])
    monkeypatch.setattr(placement, "free", lambda: next(looks))
    config = load_serve_config({}, ["deployment.cpus=2"])
    assert placement.place_engines(config, running=False).cpus == 2.0
    assert next(looks, None) is None
    monkeypatch.setattr(placement, "free", dict)
    assert placement.place_engines(config, running=True).cpus == 2.0
    monkeypatch.setattr(placement, "_FREE_SECONDS", 0.0)
    with pytest.raises(HardwareError, match="0 of 4 are free"):
        placement.place_engines(config, running=False)


def test_it_says_what_the_engines_run_on() -> None:
    from rayfin.cli.serve import _engines, _where
    from rayfin.serving.deployment_lifecycle import RunningDeployment

    def told(settings: str, nodes: list[dict[str, float]]) -> tuple[str, dict[str, Any]]:
        named = [s if "engine." in s else f"deployment.{s}" for s in settings.split()]
        config, where = load_serve_config({}, named), place(settings, nodes)
        engine = config.engine.fitted(where.gpus, 4096)
        deployed = RunningDeployment("", config.model_copy(update={"engine": engine}), where)
        return _where(deployed), _engines(deployed)

    line, one = told("replicas=1", [{"CPU": 2.0}])
    assert line == "1 engine on the CPU (2 CPUs), 16 rows of up to 2048 tokens"
    guide = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    assert f"```\n{line}\n```" in guide
    assert (one["device"], one["gpus"], one["max_rows"]) == ("cpu", 0.0, 16)
    line, many = told("replicas=1 max_replicas=8", GPUS)
    assert line == "1 to 8 engines on 1 GPU (8 CPUs), each 32 rows of up to 2048 tokens"
    assert (many["device"], many["gpus"], many["max_replicas"]) == ("gpu", 1.0, 8)
    assert len(many["notes"]) == 1
    line, half = told("replicas=4 gpus=0.5 engine.type=vllm", GPUS)
    assert line == "4 vLLM engines on 0.5 GPU (4 CPUs), each 256 rows of up to 4096 tokens"
    assert half["type"] == "vllm"


def test_all_replicas_have_what_was_decided_and_only_serves_own_commands_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayfin.serving import deployment
    from rayfin.serving.placement import Placement

    waits: list[bool] = []

    def decided(_: Any, *, running: bool, may_grow: bool) -> Placement:
        waits.append(may_grow)
        return Placement(4.0, 1.0)

    monkeypatch.setattr(deployment, "place_engines", decided)
    settings = ["model.name=tiny", f"storage={tmp_path}", "deployment.max_replicas=3"]
    by_command = deployment.build_app(load_serve_config({}, settings))
    by_file = deployment.app(dict(each.split("=") for each in settings), tmp_path)
    assert waits == [False, True]
    for application in (by_command, by_file):
        api = application._bound_deployment
        of_api, engines = api.init_args
        engine = engines._bound_deployment
        of_engine, use_gpu = engine.init_args
        assert of_api == of_engine and use_gpu is True
        assert (of_engine.engine.max_rows, of_engine.engine.max_queue) == (32, 256)
        assert engine.ray_actor_options["num_gpus"] == 1.0
        scaling = engine._deployment_config.autoscaling_config
        assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
        assert scaling.target_ongoing_requests == 24.0
        assert engine.max_ongoing_requests == 4 * (32 + 256)
