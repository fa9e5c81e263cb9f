"""What the endpoints share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import Request

from rayfin.config.serving import ApiConfig, ApiKey
from rayfin.errors import AdapterError, AdapterNotFound, StorageError, Unavailable
from rayfin.serving.api.answers import TokenTexts
from rayfin.serving.api.ends import AnswerEnds
from rayfin.serving.api.figures import Figures
from rayfin.serving.api.keys import Keys, check_use
from rayfin.serving.api.metrics import Metrics
from rayfin.serving.api.own_files import OwnFiles
from rayfin.serving.api.prompts import Prompts
from rayfin.serving.api.protocol import ServedEngine
from rayfin.serving.api.record import Record, RequestLog, record_of
from rayfin.serving.api.templates import Templates
from rayfin.serving.bounded import BoundedCalls
from rayfin.serving.names import ModelNames, ResolvedModel
from rayfin.serving.public import Outage

_LOOK_SECONDS = 10.0
"""Time for a look at the registry; a disk that takes longer is as good as away."""
_COLLECT_SECONDS = 3.0
"""Time for the figures of all replicas; whoever scrapes them waits for 10 s by default."""


@dataclass(frozen=True)
class Service:
    engine: ServedEngine
    names: ModelNames
    config: ApiConfig
    keys: Keys
    templates: Templates
    prompts: Prompts
    ends: AnswerEnds
    tokens: TokenTexts
    metrics: Metrics
    log: RequestLog | None
    figures: Figures | None
    looks: BoundedCalls
    """Looks at the registry for requests."""
    checks: BoundedCalls
    """Looks at the registry for /health, which wait behind no request's."""
    figures_now: BoundedCalls
    """Collects the figures for /metrics, from Ray's head where there is one."""
    outage: Outage = field(default_factory=lambda: Outage("the registry of adapters"))

    @classmethod
    def of(
        cls, engine: ServedEngine, names: ModelNames, config: ApiConfig, figures: Figures | None
    ) -> Service:
        """Raises StorageError for a request log that can't be written."""
        looks = BoundedCalls("registry", threads=8, seconds=_LOOK_SECONDS, most_stuck=32)
        own = OwnFiles(looks)
        templates = Templates(engine.tokenizer, config.template_seconds, own)
        return cls(
            engine,
            names,
            config,
            Keys(config),
            templates,
            Prompts(engine.tokenizer, templates),
            AnswerEnds(engine.tokenizer, templates, own),
            TokenTexts(engine.tokenizer),
            Metrics(engine, names.base_name, config.max_adapter_labels),
            RequestLog(config.request_log, text=config.request_log_text)
            if config.request_log is not None
            else None,
            figures,
            looks,
            BoundedCalls("health", threads=2, seconds=_LOOK_SECONDS, most_stuck=8),
            BoundedCalls("metrics", threads=1, seconds=_COLLECT_SECONDS, most_stuck=4),
        )

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
        self.metrics.close()
        if self.figures is not None:
            self.figures.close()
        self.templates.close()
        self.looks.close()
        self.checks.close()
        self.figures_now.close()

    def count(self, record: Record) -> None:
        """Takes down a request for completions that has ended."""
        self.metrics.count(record)
        if self.figures is not None:
            self.figures.count(record)
        if self.log is not None:
            self.log.write(record)

    def admit(self, request: Request) -> ApiKey | None:
        """The request's key until it ends; None without keys. Raises ApiError 401 or 429."""
        key = self.keys.admit(request)
        record_of(request).key = key
        return key

    async def resolve(self, model: str, key: ApiKey | None, *, anew: bool = False) -> ResolvedModel:
        """Who answers `key`'s request for `model`; raises AdapterError, or ApiError 403."""
        check_use(key, self.names.parse(model), self.names.base_name)
        if not anew and (held := self.names.held(model)) is not None:
            return held
        try:
            look = partial(self.names.resolve, model, anew=anew)
            named: ResolvedModel = await self.look(f"'{model[:80]}' is being looked up", look)
            return named
        except AdapterNotFound as error:
            if key is None or key.adapters is None:
                raise
            # The hints in the message may name adapters that are none of this key's business.
            raise AdapterNotFound(f"there is no '{model}' here") from error

    async def look(
        self, what: str, call: Callable[[], Any], calls: BoundedCalls | None = None
    ) -> Any:
        """What `call` says of the registry; raises Unavailable where that is away, or stalls.

        The event loop waits for no disk. `calls` runs it; None is `looks`.
        """
        try:
            found = await asyncio.wrap_future((calls or self.looks).submit(what, call))
        except StorageError as error:
            raise self.away(error) from error
        except AdapterError:
            self.outage.over()
            raise
        self.outage.over()
        return found

    def away(self, error: StorageError) -> Unavailable:
        """What clients are told while the registry is away; the log gets `error`, once."""
        self.outage.away(error)
        return Unavailable(
            "the registry of adapters can't be reached now, so that no adapter can be looked up; "
            f"'{self.names.base_name}' itself answers: try again later"
        )
