"""The state that the endpoints of one app share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import Request

from rayfin.config.serving import ApiConfig, ApiKey
from rayfin.errors import AdapterError, AdapterNotFound, StorageError, Unavailable
from rayfin.serving.api.adapter_tokenizers import AdapterTokenizers
from rayfin.serving.api.api_keys import ApiKeys, check_use
from rayfin.serving.api.choice_writers import TokenTexts
from rayfin.serving.api.ends import AnswerEnds
from rayfin.serving.api.history_metrics import HistoryMetrics
from rayfin.serving.api.metrics import PrometheusMetrics
from rayfin.serving.api.prompts import Prompts
from rayfin.serving.api.protocol import ServedEngine
from rayfin.serving.api.request_log import RequestLog, RequestRecord, record_of
from rayfin.serving.api.templates import Templates
from rayfin.serving.model_names import ModelNames, ResolvedModel
from rayfin.serving.public_messages import AvailabilityLog
from rayfin.serving.timed_executor import TimedExecutor

_READ_SECONDS = 10.0
"""Time for a look at the registry; a disk that takes longer is as good as away."""
_COLLECT_SECONDS = 3.0
"""Time for the metrics of all replicas; whoever scrapes them waits for 10 s by default."""


@dataclass(frozen=True)
class Service:
    """The engine, the names it answers to, and what counts, limits and logs its requests."""

    engine: ServedEngine
    names: ModelNames
    config: ApiConfig
    keys: ApiKeys
    templates: Templates
    prompts: Prompts
    ends: AnswerEnds
    tokens: TokenTexts
    metrics: PrometheusMetrics
    log: RequestLog | None
    history_metrics: HistoryMetrics | None
    registry_reads: TimedExecutor
    """Looks at the registry for requests."""
    health_checks: TimedExecutor
    """Looks at the registry for /health, which wait behind no request's."""
    metric_reads: TimedExecutor
    """Collects the metrics for /metrics, from Ray's head where there is one."""
    availability: AvailabilityLog = field(
        default_factory=lambda: AvailabilityLog("the registry of adapters")
    )

    @classmethod
    def of(
        cls,
        engine: ServedEngine,
        names: ModelNames,
        config: ApiConfig,
        history_metrics: HistoryMetrics | None,
    ) -> Service:
        """Raises StorageError for a request log that can't be written."""
        registry_reads = TimedExecutor("registry", threads=8, seconds=_READ_SECONDS, most_stuck=32)
        own = AdapterTokenizers(registry_reads)
        templates = Templates(engine.tokenizer, config.template_seconds, own)
        return cls(
            engine,
            names,
            config,
            ApiKeys(config),
            templates,
            Prompts(engine.tokenizer, templates),
            AnswerEnds(engine.tokenizer, templates, own),
            TokenTexts(engine.tokenizer),
            PrometheusMetrics(engine, names.base_name, config.max_adapter_labels),
            RequestLog(config.request_log, text=config.request_log_text)
            if config.request_log is not None
            else None,
            history_metrics,
            registry_reads,
            TimedExecutor("health", threads=2, seconds=_READ_SECONDS, most_stuck=8),
            TimedExecutor("metrics", threads=1, seconds=_COLLECT_SECONDS, most_stuck=4),
        )

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
        self.metrics.close()
        if self.history_metrics is not None:
            self.history_metrics.close()
        self.templates.close()
        self.registry_reads.close()
        self.health_checks.close()
        self.metric_reads.close()

    def count(self, record: RequestRecord) -> None:
        """Takes down a request for completions that has ended."""
        self.metrics.count(record)
        if self.history_metrics is not None:
            self.history_metrics.count(record)
        if self.log is not None:
            self.log.write(record)

    def admit(self, request: Request) -> ApiKey | None:
        """Return the request's key until it ends; None without keys. Raises ApiError 401 or 429."""
        key = self.keys.admit(request)
        record_of(request).key = key
        return key

    async def resolve(self, model: str, key: ApiKey | None, *, anew: bool = False) -> ResolvedModel:
        """Return who answers `key`'s request for `model`; raises AdapterError, or ApiError 403."""
        check_use(key, self.names.parse(model), self.names.base_name)
        if not anew and (held := self.names.held(model)) is not None:
            return held
        try:
            look = partial(self.names.resolve, model, anew=anew)
            named: ResolvedModel = await self.read_registry(
                f"'{model[:80]}' is being looked up", look
            )
            return named
        except AdapterNotFound as error:
            if key is None or key.adapters is None:
                raise
            # The hints in the message may name adapters that are none of this key's business.
            raise AdapterNotFound(f"there is no '{model}' here") from error

    async def read_registry(
        self, what: str, call: Callable[[], Any], calls: TimedExecutor | None = None
    ) -> Any:
        """Return what `call` reads in the registry; raises Unavailable where that is away, or
        stalls.

        The event loop waits for no disk. `calls` runs it; None is `registry_reads`.
        """
        try:
            found = await asyncio.wrap_future((calls or self.registry_reads).submit(what, call))
        except StorageError as error:
            raise self.away(error) from error
        except AdapterError:
            self.availability.over()
            raise
        self.availability.over()
        return found

    def away(self, error: StorageError) -> Unavailable:
        """Return what clients are told while the registry is away; the log gets `error`, once."""
        self.availability.away(error)
        return Unavailable(
            "the registry of adapters can't be reached now, so that no adapter can be looked up; "
            f"'{self.names.base_name}' itself answers: try again later"
        )
