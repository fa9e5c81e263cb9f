"""The metrics of all replicas of a deployment, added up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from rayfin.serving.api.metrics import GAUGES, Metrics
from rayfin.serving.counts import Counts, first_names, total

API, ENGINE = "api", "engine"
"""The kinds of replicas that write counts."""


def counts_of(stats: Any) -> dict[str, float]:
    """Returns what an engine has counted: the fields of its `stats` that are no gauges."""
    return {name: value for name, value in asdict(stats).items() if name not in GAUGES}


class SharedPool:
    """`rayfin.serving.api.metrics.Pool` over Ray's key-value store."""

    def __init__(self, metrics: Metrics) -> None:
        self._counts = Counts(API, metrics.counted)

    def labels(self, wanted: Iterable[str], most: int) -> set[str]:
        return first_names("adapters", wanted, most)

    def total(self) -> Mapping[str, float]:
        self._counts.write()
        return total(API)

    def engine_total(self) -> Mapping[str, float]:
        return total(ENGINE)

    def close(self) -> None:
        self._counts.close()
