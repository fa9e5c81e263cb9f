"""Routes of GET /v1/models, /health and /metrics, and of POST /tokenize."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from datetime import datetime

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from rayfin.adapters import LATEST
from rayfin.serving.api.api_keys import may_use
from rayfin.serving.api.choice_writers import Json
from rayfin.serving.api.documents import (
    Health,
    ModelCard,
    ModelList,
    TokenizeAnswer,
    failures,
    takes,
)
from rayfin.serving.api.errors import ApiError
from rayfin.serving.api.protocol import failure_of
from rayfin.serving.api.request_body import read_body
from rayfin.serving.api.schema import TokenizeBody
from rayfin.serving.api.service import Service
from rayfin.serving.model_names import RegistryListing, ResolvedModel

log = logging.getLogger(__name__)


def model_routes(service: Service) -> APIRouter:
    """Return the routes that need an API key where there are any."""
    router = APIRouter()
    names = service.names

    @router.get("/v1/models", responses={200: {"model": ModelList}, **failures(401, 429)})
    async def list_models(request: Request) -> Response:
        """The base, and of every adapter that fits it the latest version and the aliases."""
        key = service.admit(request)
        listing: RegistryListing = await service.read_registry(
            "the registry is being listed", names.list
        )
        cards = [
            _card(model, who, names.base_name)
            for who in (ResolvedModel(names.base_name), *listing.served)
            if may_use(key, who.adapter or names.base_name)
            for model in _models(who)
        ]
        refused = [version.ref for version in listing.refused if may_use(key, version.name)]
        return JSONResponse({"object": "list", "data": cards, "not_served": refused})

    @router.get(
        "/v1/models/{model:path}",
        responses={200: {"model": ModelCard}, **failures(400, 401, 403, 404, 429)},
    )
    async def retrieve_model(request: Request, model: str) -> Response:
        """Who answers to a name now."""
        named = await service.resolve(model, service.admit(request))
        return JSONResponse(_card(model, named, names.base_name))

    @router.post(
        "/tokenize",
        openapi_extra=takes(TokenizeBody),
        responses={
            200: {"model": TokenizeAnswer},
            **failures(400, 401, 403, 404, 408, 413, 429),
        },
    )
    async def tokenize(request: Request) -> Response:
        """Token ids of a text or a conversation."""
        key = service.admit(request)
        body = await read_body(request, TokenizeBody, service.config)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give one of prompt and messages", param="prompt")
        model = names.base_name if body.model is None else body.model
        named = await service.resolve(model, key)
        if body.tools and body.messages is None:
            raise ApiError(400, "tools go with messages", param="tools")
        if body.messages is not None:
            ids = await service.prompts.of_chat(named.source, body.messages, body.tools)
        else:
            special = body.add_special_tokens is not False
            ids = await service.prompts.of_text(body.prompt or "", special_tokens=special)
        room = service.engine.max_length
        return JSONResponse({"count": len(ids), "max_model_len": room, "tokens": list(ids)})

    return router


def open_routes(service: Service) -> APIRouter:
    """Return the routes that need no key: whatever restarts or balances servers asks for them."""
    router = APIRouter()
    engine = service.engine

    @router.get("/health", responses={200: {"model": Health}, **failures(503)})
    async def health(request: Request) -> Response:
        """200 while the engine is well, and the registry is there."""
        if (failure := failure_of(engine)) is not None:
            raise ApiError(
                503,
                f"the engine has stopped ({type(failure).__name__}); look at its log, and start "
                "the server again if nothing else does",
            )
        check = service.names.catalog.check
        # Not among the looks for requests, which may be many: this tells who restarts servers.
        await service.read_registry("the registry is being looked at", check, service.health_checks)
        stats = engine.stats()
        answer: Json = {"status": "ok", "waiting": stats.waiting, "running": stats.running}
        if service.keys.may_see_all(request):
            answer["resident"] = list(engine.resident())
        return JSONResponse(answer)

    return router


def metrics_routes(service: Service) -> APIRouter:
    """Return the route of the metrics, which name every adapter: not for keys limited to some."""
    router = APIRouter()

    @router.get(
        "/metrics",
        response_class=Response,
        responses={
            200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
            **failures(401, 503),
        },
    )
    async def metrics(request: Request) -> Response:
        """Figures in Prometheus's text format, by adapter."""
        if not service.keys.may_see_all(request):
            raise ApiError(
                401,
                "these figures name all adapters; send the admin token, or an API key that may use "
                "them all, as Authorization: Bearer KEY",
                headers={"www-authenticate": "Bearer"},
            )
        what = "the figures of all replicas are being collected"
        try:
            text = await asyncio.wrap_future(
                service.metric_reads.submit(what, service.metrics.text)
            )
        except Exception as error:  # whatever the deployment's store raises, or it takes too long
            log.warning("metrics can't be collected now: %s", error)
            raise ApiError(
                503,
                "the figures of all replicas can't be collected now, as Ray's head does not answer "
                "or is busy; try again",
                code="unavailable",
                headers={"retry-after": "5"},
            ) from error
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    return router


def _models(named: ResolvedModel) -> Iterator[str]:
    """Yield all names that `named` answers to."""
    if named.version is None:
        yield named.answer_name
        return
    if LATEST in named.version.aliases:
        yield named.version.name
    yield named.answer_name
    for alias in named.version.aliases:
        if alias != LATEST:
            yield f"{named.version.name}@{alias}"


def _card(model: str, named: ResolvedModel, base_name: str) -> Json:
    return {
        "id": model,
        "object": "model",
        "created": _created(named),
        "owned_by": "rayfin",
        "root": named.answer_name,
        "parent": None if named.source is None else base_name,
    }


def _created(named: ResolvedModel) -> int:
    try:
        created = named.version.metadata["created_at"] if named.version is not None else ""
        return max(0, int(datetime.fromisoformat(created).timestamp()))
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0
