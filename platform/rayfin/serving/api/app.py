"""The HTTP API of one engine as a FastAPI app."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayfin.config.serving import ServeConfig
from rayfin.errors import Overloaded
from rayfin.serving.api.admin import admin_routes
from rayfin.serving.api.completions import completion_routes
from rayfin.serving.api.documents import describe_bodies
from rayfin.serving.api.errors import CLIENT_GONE, as_api_error, handle_errors
from rayfin.serving.api.history_metrics import HistoryMetrics
from rayfin.serving.api.metrics import MetricsAggregator, PrometheusMetrics
from rayfin.serving.api.models import metrics_routes, model_routes, open_routes
from rayfin.serving.api.protocol import ServedEngine
from rayfin.serving.api.request_log import RequestRecord, request_id_of
from rayfin.serving.api.schema import (
    Body,
    ChatBody,
    CompletionBody,
    LoadAdapterBody,
    TokenizeBody,
    UnloadAdapterBody,
)
from rayfin.serving.api.service import Service
from rayfin.serving.model_names import ModelNames
from rayfin.version import __version__


def create_app(
    engine: ServedEngine,
    names: ModelNames,
    config: ServeConfig,
    history_metrics: HistoryMetrics | None = None,
    *,
    aggregator: Callable[[PrometheusMetrics], MetricsAggregator] | None = None,
    max_requests: int | None = None,
) -> FastAPI:
    """Return the API in front of an engine that has started; closing the engine is the caller's.

    `history_metrics` writes what is measured to the history, and is closed with the app.
    `aggregator` adds this replica's metrics to the deployment's. More than `max_requests` requests
    at a time, but for /health and /metrics, are refused with 429; None is no bound.
    Raises StorageError for a request log that can't be written.
    """
    service = Service.of(engine, names, config.api, history_metrics)
    service.metrics.aggregator = None if aggregator is None else aggregator(service.metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        # It may wait for the history: streams that end now don't.
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="rayfin",
        version=__version__,
        description="One base model, many adapters, switched per request.",
        # The pages for people load scripts from elsewhere; /openapi.json is here.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    bearer = Security(HTTPBearer(auto_error=False, description="An API key."))
    token = Security(HTTPBearer(auto_error=False, scheme_name="Admin", description="The token."))
    guarded = [bearer] if service.keys.needed else []
    app.include_router(completion_routes(service), dependencies=guarded)
    app.include_router(model_routes(service), dependencies=guarded)
    app.include_router(metrics_routes(service), dependencies=guarded)
    app.include_router(open_routes(service))
    bodies: list[type[Body]] = [ChatBody, CompletionBody, TokenizeBody]
    if config.api.admin_token is not None:
        app.include_router(admin_routes(service, config), dependencies=[token])
        bodies += [LoadAdapterBody, UnloadAdapterBody]
    describe_bodies(app, bodies)
    handle_errors(app, names)
    app.add_middleware(_RequestMiddleware, service=service, max_requests=max_requests)
    return app


_ALWAYS_ADMITTED = ("/health", "/metrics")


class _RequestMiddleware:
    """Gives every request its record, and counts and logs those for completions as they end.

    HEAD is answered as GET: the server in front, uvicorn, leaves out the body (RFC 9110, 9.3.2).
    """

    def __init__(self, app: ASGIApp, service: Service, max_requests: int | None) -> None:
        self._app, self._service = app, service
        self._most, self._at_work = max_requests, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(scope["path"], request_id_of(scope))
        scope.setdefault("state", {})["record"] = record
        is_post = scope["method"] == "POST"
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        counts = scope["path"] not in _ALWAYS_ADMITTED

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                name = (b"x-request-id", record.request_id.encode())
                message["headers"] = [*message["headers"], name]
            await send(message)

        self._at_work += counts
        try:
            if counts and self._most is not None and self._at_work > self._most:
                # What is left of the replica's places is for /health and /metrics.
                error = Overloaded(f"{self._most} requests are at work here; try again soon")
                response = as_api_error(error, self._service.names).response()
                await response(scope, receive, send_marked)
                return
            await self._app(scope, receive, send_marked)
        except asyncio.CancelledError:
            record.status = CLIENT_GONE
            raise
        except Exception:
            record.status = 500  # also after an answer has begun with 200
            raise
        finally:
            self._at_work -= counts
            self._service.keys.release(record.key)
            if is_post and record.path.endswith("/completions"):
                self._service.count(record)
