"""Counters that outlive the replica that made them: one sum for the whole deployment, never less.

Each replica writes its counts under a key of its own in Ray's key-value store. One that starts
takes over the key of one that has died, and counts on from there: there are never more keys than
there were replicas at a time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import ray
from ray.util import list_named_actors

from rayfin.serving import kv_store
from rayfin.serving.api.metrics import GAUGES, PrometheusMetrics

log = logging.getLogger(__name__)

API, ENGINE = "api", "engine"
"""The kinds of replicas that write counts."""

_PERIOD = 1.0
_CLOSING_SECONDS = 5.0


class ReplicaCounters:
    """This replica's counters, written every second by a thread beside those of its kind."""

    def __init__(self, kind: str, read: Callable[[], Mapping[str, float]]) -> None:
        """`read` returns what this process has counted since its start, on any thread."""
        self._kind, self._read = kind, read
        self._key: str | None = None
        self._before: Mapping[str, float] = {}
        """The counts under the key when this replica took it over."""
        self._complained = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="counts", daemon=True)
        self._thread.start()

    def write(self) -> None:
        """Writes what has been counted by now; raises where Ray's head is away."""
        with self._lock:
            if self._key is None:
                self._key, self._before = _take_key(self._kind)
            kv_store.put(self._key, sum_by_name([self._before, self._read()]))

    def close(self) -> None:
        """Writes what has been counted; gives up after a while where Ray's head hangs."""
        self._stop.set()
        self._thread.join(_CLOSING_SECONDS)
        if self._thread.is_alive():
            log.warning("the last counts can't be written: Ray's head does not answer")

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD):
            self._try()
        self._try()

    def _try(self) -> None:
        try:
            self.write()
            self._complained = False
        except Exception as error:  # noqa: BLE001  # whatever Ray raises; the next time may do
            if not self._complained:
                log.warning("counts can't be written now, and are kept: %s", error)
            self._complained = True


def total(kind: str) -> dict[str, float]:
    """Returns the sums over all replicas of a kind, those that have died included."""
    return sum_by_name([kv_store.get(key) or {} for key in kv_store.keys(f"counts/{kind}/")])


def sum_by_name(counts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Returns the sum of the values of each name."""
    sums: dict[str, float] = {}
    for one in counts:
        for name, value in one.items():
            sums[name] = sums.get(name, 0) + value
    return sums


def first_names(kind: str, wanted: Iterable[str], most: int) -> set[str]:
    """Returns the first `most` names that any replica has ever wanted, `wanted` among them while
    there is room.

    Each is a key that is written once, so that all replicas see the same.
    """
    prefix = f"names/{kind}/"
    names = [str(kv_store.get(key)) for key in kv_store.keys(prefix)]
    for name in wanted:
        while name not in names and len(names) < most:
            key = f"{prefix}{len(names):08}"
            names.append(
                str(kv_store.get(key)) if kv_store.put(key, name, overwrite=False) else name
            )
    return set(names)


def engine_counters(stats: Any) -> dict[str, float]:
    """Returns what an engine has counted: the fields of its `stats` that are no gauges."""
    return {name: value for name, value in asdict(stats).items() if name not in GAUGES}


class RayMetricsAggregator:
    """A `rayfin.serving.api.metrics.MetricsAggregator` over Ray's key-value store."""

    def __init__(self, metrics: PrometheusMetrics) -> None:
        self._counts = ReplicaCounters(API, metrics.counted)

    def labels(self, wanted: Iterable[str], most: int) -> set[str]:
        return first_names("adapters", wanted, most)

    def total(self) -> Mapping[str, float]:
        self._counts.write()
        return total(API)

    def engine_total(self) -> Mapping[str, float]:
        return total(ENGINE)

    def close(self) -> None:
        self._counts.close()


def _take_key(kind: str) -> tuple[str, Mapping[str, float]]:
    """Returns a key for counts whose owner has died, or a new one, and the counts under it.

    An owner is an entry that is written once, `owner/KIND/INDEX/NUMBER`: of several replicas that
    want the key at the same time one gets it.
    """
    me = ray.get_runtime_context().get_actor_name()
    alive = {actor["name"] for actor in list_named_actors(all_namespaces=True)}
    index = 0
    while True:
        prefix = f"owner/{kind}/{index}/"
        owners = sorted(int(key.removeprefix(prefix)) for key in kv_store.keys(prefix))
        last = owners[-1] if owners else -1
        free = last < 0 or kv_store.get(f"{prefix}{last}") not in alive
        if free and not kv_store.put(f"{prefix}{last + 1}", me, overwrite=False):
            key = f"counts/{kind}/{index}"
            return key, kv_store.get(key) or {}
        index += 1
