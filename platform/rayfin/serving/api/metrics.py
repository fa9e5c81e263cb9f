"""The metrics that /metrics shows, in a registry of the app's own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from rayfin.serving.api.protocol import ServedEngine
from rayfin.serving.api.request_log import RequestRecord

OTHER = "other"
"""The label of adapters that have none of their own, and of names that aren't adapters."""

GAUGES = ("waiting", "running", "host_bytes", "table_bytes", "replicas")
"""The engine's figures that are about now; all others count from the start."""

_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class MetricsAggregator(Protocol):
    """Sums the counts of a deployment's replicas, those that died included.

    From any thread but the event loop's; raises where it can't be reached.
    """

    def labels(self, wanted: Iterable[str], most: int) -> set[str]:
        """Return the adapters with a label of their own in every replica, the first `most` seen."""

    def total(self) -> Mapping[str, float]:
        """Return `PrometheusMetrics.counted` over all API replicas, with this one's latest."""

    def engine_total(self) -> Mapping[str, float]:
        """Return the engine's counts over all engine replicas."""

    def close(self) -> None:
        """Leaves what this replica has counted to the others."""


class PrometheusMetrics:
    """Metrics by adapter, of at most `max_labels` adapters, the first that were asked for.

    With an `aggregator` they are those of the whole deployment, whichever replica is asked.
    """

    def __init__(self, engine: ServedEngine, base_name: str, max_labels: int) -> None:
        self._engine, self._max_labels = engine, max_labels
        self.aggregator: MetricsAggregator | None = None
        self._labels = {base_name}
        """Names that have a label of their own; the base's is there beside the adapters'."""
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

    def count(self, record: RequestRecord) -> None:
        """Adds a request for completions that has ended."""
        label = self._label(record.adapter)
        self._requests.labels(label, str(record.status)).inc()
        self._prompt_tokens.labels(label).inc(record.prompt_tokens)
        self._generated_tokens.labels(label).inc(record.completion_tokens)
        if record.seconds_to_first_token is not None:
            self._first.labels(label).observe(record.seconds_to_first_token)
        if record.seconds_per_token is not None:
            self._each.labels(label).observe(record.seconds_per_token)

    def counted(self) -> dict[str, float]:
        """Return every series of this process, as JSON [family, sample, labels] -> value.

        Adapters for which the aggregator has no label are `other`, here as in every other replica.
        """
        samples = [
            (family.name, sample)
            for family in self._registry.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")  # times don't add up
        ]
        self._agree({sample.labels["adapter"] for _, sample in samples})
        sums: dict[str, float] = {}
        for family, sample in samples:
            labels = dict(sample.labels)
            if labels["adapter"] not in self._labels:
                labels["adapter"] = OTHER
            key = json.dumps([family, sample.name, labels])
            sums[key] = sums.get(key, 0.0) + sample.value
        return sums

    def close(self) -> None:
        if self.aggregator is not None:
            self.aggregator.close()

    def text(self) -> bytes:
        """Returns all figures in Prometheus's text format; may wait, so not for the event loop."""
        shown = CollectorRegistry()
        shown.register(_Shown(self._families()))
        return generate_latest(shown)

    def _families(self) -> Iterator[Metric]:
        counts = self.counted() if self.aggregator is None else self.aggregator.total()
        families = {
            family.name: Metric(family.name, family.documentation, family.type)
            for family in self._registry.collect()
        }
        for key, value in counts.items():
            family, sample, labels = json.loads(key)
            if family in families:  # another version's counts stay in the store after an update
                families[family].add_sample(sample, labels, value)
        yield from families.values()
        now = dataclasses.asdict(self._engine.stats())
        counted = now if self.aggregator is None else self.aggregator.engine_total()
        for name in GAUGES:
            if name in now:
                words = f"The engine's {name.replace('_', ' ')} now."
                yield GaugeMetricFamily(f"rayfin_engine_{name}", words, now[name])
        for name in [name for name in counted if name not in GAUGES]:
            words = f"{name.replace('_', ' ').capitalize()} of all engine replicas so far."
            yield CounterMetricFamily(f"rayfin_engine_{name}", words, counted[name])
        resident = len(self._engine.resident())
        yield GaugeMetricFamily("rayfin_engine_resident", "Adapters in slots now.", resident)

    def _label(self, adapter: str | None) -> str:
        """Return the label of `adapter`, which is one that was found, or None."""
        if adapter is None:
            return OTHER
        if self.aggregator is None:
            self._agree({adapter})
        elif not self._full:
            return adapter  # the replicas agree when it is shown: asking takes a while
        return adapter if adapter in self._labels else OTHER

    @property
    def _full(self) -> bool:
        return len(self._labels) > self._max_labels  # the base's name is beside the adapters'

    def _agree(self, adapters: set[str]) -> None:
        """Gives those of them a label that can have one."""
        wanted = sorted(adapters - self._labels - {OTHER})
        if not wanted or self._full:
            return
        if self.aggregator is None:
            self._labels.update(wanted[: self._max_labels + 1 - len(self._labels)])
        else:
            self._labels |= self.aggregator.labels(wanted, self._max_labels)


class _Shown(Collector):
    """A collector of metric families that are there already."""

    def __init__(self, families: Iterator[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterator[Metric]:
        yield from self._families
