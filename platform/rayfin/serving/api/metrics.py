"""What /metrics shows, in a registry of the app's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from rayfin.serving.api.protocol import ServedEngine
from rayfin.serving.api.record import Record

OTHER = "other"
"""The label of adapters that have none of their own, and of names that aren't adapters."""

_GAUGES = ("waiting", "running", "host_bytes", "replicas")
_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """Figures by adapter: of at most `max_labels` adapters, the first that were asked for."""

    def __init__(self, engine: ServedEngine, base_name: str, max_labels: int) -> None:
        self._max_labels = max_labels
        self._labels = {base_name}
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "rayfin_requests",
            "Requests for completions that have ended, by HTTP status (499: the client went away).",
            ("adapter", "status"),
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "rayfin_prompt_tokens", "Tokens of their prompts.", ("adapter",), registry=registry
        )
        self._generated_tokens = Counter(
            "rayfin_generated_tokens", "Tokens of their answers.", ("adapter",), registry=registry
        )
        self._first = Histogram(
            "rayfin_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            ("adapter",),
            buckets=_FIRST,
            registry=registry,
        )
        self._each = Histogram(
            "rayfin_time_per_output_token_seconds",
            "Mean time between an answer's tokens after the first.",
            ("adapter",),
            buckets=_EACH,
            registry=registry,
        )
        registry.register(_EngineStats(engine))

    def count(self, record: Record) -> None:
        """Adds a request for completions that has ended."""
        label = self._label(record.adapter)
        self._requests.labels(label, str(record.status)).inc()
        self._prompt_tokens.labels(label).inc(record.prompt_tokens)
        self._generated_tokens.labels(label).inc(record.completion_tokens)
        if record.seconds_to_first_token is not None:
            self._first.labels(label).observe(record.seconds_to_first_token)
        if record.seconds_per_token is not None:
            self._each.labels(label).observe(record.seconds_per_token)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)

    def _label(self, adapter: str | None) -> str:
        """`adapter` is one that was found, or None."""
        if adapter is None:
            return OTHER
        # The base's name is there already, beside the adapters'.
        if adapter not in self._labels and len(self._labels) <= self._max_labels:
            self._labels.add(adapter)
        return adapter if adapter in self._labels else OTHER


class _EngineStats(Collector):
    """The engine's own counts, read when they are asked for."""

    def __init__(self, engine: ServedEngine) -> None:
        self._engine = engine

    def describe(self) -> Iterator[Metric]:
        # Names are the engine's to choose; without this they would be asked for now.
        yield from ()

    def collect(self) -> Iterator[Metric]:
        for name, value in dataclasses.asdict(self._engine.stats()).items():
            words = f"The engine's {name.replace('_', ' ')}"
            if name in _GAUGES:
                yield GaugeMetricFamily(f"rayfin_engine_{name}", f"{words} now.", value)
            else:
                yield CounterMetricFamily(
                    f"rayfin_engine_{name}", f"{words} since its start.", value
                )
        resident = len(self._engine.resident())
        yield GaugeMetricFamily("rayfin_engine_resident", "Adapters in slots now.", resident)
