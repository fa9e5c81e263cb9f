"""Counts of a deployment's replicas, of which some die: here over a store in this process."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from rayfin.serving import kv_store, replica_metrics
from rayfin.serving.api.metrics import OTHER, PrometheusMetrics
from rayfin.serving.api.request_log import RequestRecord
from rayfin.serving.replica_metrics import (
    API,
    RayMetricsAggregator,
    ReplicaCounters,
    first_names,
    total,
)


class Cluster:
    """What the replicas see of Ray: its store, who lives, and who asks."""

    def __init__(self) -> None:
        self.store: dict[str, str] = {}
        self.alive: set[str] = set()
        self.me = ""

    def put(self, key: str, value: Any, *, overwrite: bool = True) -> bool:
        there = key in self.store
        if overwrite or not there:
            self.store[key] = json.dumps(value)
        return there

    def get(self, key: str) -> Any:
        return json.loads(self.store[key]) if key in self.store else None

    def keys(self, prefix: str) -> list[str]:
        return sorted(key for key in self.store if key.startswith(prefix))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    for name in ("put", "get", "keys"):
        monkeypatch.setattr(kv_store, name, getattr(cluster, name))
    monkeypatch.setattr(replica_metrics, "_PERIOD", 3600.0)  # they are told when to write
    actors = lambda **_: [{"name": name} for name in cluster.alive]  # noqa: E731
    monkeypatch.setattr(replica_metrics, "list_named_actors", actors)
    context = SimpleNamespace(get_actor_name=lambda: cluster.me)
    monkeypatch.setattr(replica_metrics.ray, "get_runtime_context", lambda: context)
    return cluster


@pytest.fixture
def start(cluster: Cluster) -> Iterator[Callable[[str, dict[str, float]], ReplicaCounters]]:
    """Starts a replica that has counted so much."""
    made: list[ReplicaCounters] = []

    def begin(name: str, counted: dict[str, float]) -> ReplicaCounters:
        cluster.alive.add(name)
        cluster.me = name
        made.append(ReplicaCounters("engine", lambda: counted))
        made[-1].write()
        return made[-1]

    yield begin
    for one in made:
        one.close()


def test_the_sum_never_falls_whoever_dies_and_takes_no_more_room(
    cluster: Cluster, start: Callable[[str, dict[str, float]], ReplicaCounters]
) -> None:
    first: dict[str, float] = {"finished": 5}
    one = start("a", first)
    start("b", {"finished": 2, "steps": 9})
    first["finished"] = 7
    one.write()
    assert total("engine") == {"finished": 9, "steps": 9}
    for number in range(50):
        cluster.alive.discard("a" if number == 0 else f"c{number - 1}")
        assert total("engine")["finished"] == 9 + number
        start(f"c{number}", {"finished": 1})
    assert total("engine") == {"finished": 59, "steps": 9}
    assert len(cluster.keys("counts/engine/")) == 2, "a place for each that lives at a time"


def test_of_two_that_want_a_dead_ones_place_one_gets_it(
    cluster: Cluster,
    start: Callable[[str, dict[str, float]], ReplicaCounters],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start("a", {"finished": 5})
    cluster.alive.clear()
    cluster.alive.add("rival")
    put = cluster.put

    def overtaken(key: str, value: Any, *, overwrite: bool = True) -> bool:
        if key == "owner/engine/0/1":  # just before this one
            put(key, "rival", overwrite=False)
        return put(key, value, overwrite=overwrite)

    monkeypatch.setattr(kv_store, "put", overtaken)
    start("b", {"finished": 3})
    assert cluster.get("owner/engine/0/1") == "rival"
    assert cluster.get("counts/engine/1") == {"finished": 3}
    assert total("engine") == {"finished": 8}


def test_what_can_not_be_written_is_kept(
    cluster: Cluster,
    start: Callable[[str, dict[str, float]], ReplicaCounters],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted: dict[str, float] = {"finished": 5}
    one = start("a", counted)
    with monkeypatch.context() as away:
        away.setattr(kv_store, "put", lambda *_, **__: 1 / 0)
        counted["finished"] = 6
        with pytest.raises(ZeroDivisionError):
            one.write()
        one._try()  # its thread goes on
    one._try()
    assert total("engine") == {"finished": 6}


def test_all_replicas_name_the_same_adapters(cluster: Cluster) -> None:
    assert first_names("adapters", ["red", "blue"], 3) == {"red", "blue"}
    assert first_names("adapters", ["blue", "green", "grey"], 3) == {"red", "blue", "green"}
    assert first_names("adapters", ["grey"], 3) == {"red", "blue", "green"}


def replica(cluster: Cluster, name: str) -> PrometheusMetrics:
    cluster.alive.add(name)
    cluster.me = name
    engine: Any = SimpleNamespace(stats=stats, resident=dict)
    metrics = PrometheusMetrics(engine, "tiny", 1)
    metrics.aggregator = RayMetricsAggregator(metrics)
    metrics.aggregator.total()
    return metrics


def stats() -> Any:
    from rayfin.serving.engine.engine import EngineStats

    return EngineStats(**dict.fromkeys(EngineStats.__dataclass_fields__, 0))


def test_every_api_replica_shows_the_sum_and_no_adapter_in_two_ways(cluster: Cluster) -> None:
    one, other = replica(cluster, "one"), replica(cluster, "other")
    for metrics, adapters in ((one, ["red", "blue"]), (other, ["blue", "red", "red", None])):
        for adapter in adapters:
            metrics.count(RequestRecord("/v1/completions", adapter=adapter, status=200))
    cluster.me = "one"
    shown = [metrics.text().decode() for metrics in (one, other, one)]
    for text in shown[1:]:
        lines = {line for line in text.splitlines() if line.startswith("rayfin_requests_total")}
        # One has a label, by whoever was first; the other one is `other` in both.
        assert lines == {
            'rayfin_requests_total{adapter="blue",status="200"} 2.0',
            f'rayfin_requests_total{{adapter="{OTHER}",status="200"}} 4.0',
        }
    assert shown[1] == shown[2]
    assert set(total(API)) == set(one.aggregator.total()) if one.aggregator else False
    one.close()
    other.close()


def test_counts_of_another_version_are_left_out_of_the_metrics(cluster: Cluster) -> None:
    metrics = replica(cluster, "one")
    labels = {"adapter": "tiny"}
    cluster.put("counts/api/9", {json.dumps(["rayfin_gone", "rayfin_gone_total", labels]): 1})
    metrics.count(RequestRecord("/v1/completions", adapter="tiny", status=200))
    text = metrics.text().decode()
    assert 'rayfin_requests_total{adapter="tiny",status="200"} 1.0' in text
    assert "rayfin_gone" not in text and "since its start" not in text
    metrics.close()


def test_a_head_that_hangs_keeps_no_replica_from_ending(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hang() -> dict[str, float]:
        entered.set()
        leave.wait(540)
        return {}

    monkeypatch.setattr(replica_metrics, "_CLOSING_SECONDS", 0.01)
    one = ReplicaCounters("engine", hang)
    one.close()
    assert entered.wait(540) and not leave.is_set() and one._thread.is_alive()
    leave.set()
    one._thread.join()
