"""Routes that load and unload adapters over HTTP, behind a token of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from rayfin.adapters import LATEST, AdapterRef, Registry, check_name
from rayfin.config.serving import ServeConfig
from rayfin.errors import AdapterError, AdapterNotFound, StorageError, Unavailable
from rayfin.models import hub_id
from rayfin.serving.add_adapter import AddedAdapter, add_adapter
from rayfin.serving.api.documents import LoadedAdapter, UnloadedAdapter, failures, takes
from rayfin.serving.api.errors import ApiError, as_api_error
from rayfin.serving.api.request_body import read_body
from rayfin.serving.api.schema import LoadAdapterBody, UnloadAdapterBody
from rayfin.serving.api.service import Service
from rayfin.serving.engine.checks import BASE_IS_RIGHT

_SHOWN = 120
_TURN_SECONDS = 60.0
_FAILURES = (400, 401, 403, 408, 413, 503)


def admin_routes(service: Service, config: ServeConfig) -> APIRouter:
    router = APIRouter()
    registry = Registry(service.names.catalog.root)
    # What was given by default is what is served, too: the adapter's own word doesn't change it.
    model = config.model.model_copy(update={"name": config.model.name})
    config = config.model_copy(update={"model": model})
    # The registry's writers take turns anyway, and waiting here holds no thread.
    lock = asyncio.Lock()

    @asynccontextmanager
    async def turn() -> AsyncIterator[None]:
        """Raises Unavailable where the call before does not end, as its disk or the hub hangs."""
        try:
            async with asyncio.timeout(_TURN_SECONDS):
                await lock.acquire()
        except TimeoutError as error:
            raise Unavailable(
                "another adapter is being loaded or unloaded, and that did not end in "
                f"{_TURN_SECONDS:g} s; try again later"
            ) from error
        try:
            yield
        finally:
            lock.release()

    @router.post(
        "/v1/load_lora_adapter",
        openapi_extra=takes(LoadAdapterBody),
        responses={200: {"model": LoadedAdapter}, **failures(*_FAILURES)},
    )
    async def load_lora_adapter(request: Request) -> Response:
        """Makes an adapter the next version of a name, as `rayfin adapters add` does."""
        service.keys.admit_admin(request)
        body = await read_body(request, LoadAdapterBody, service.config)
        async with turn():
            added = await asyncio.to_thread(_add, service, registry, config, body)
        return JSONResponse(
            {
                "lora_name": added.version.ref,
                "is_new": added.is_new,
                "notes": [service.names.public(note) for note in added.notes],
            }
        )

    @router.post(
        "/v1/unload_lora_adapter",
        openapi_extra=takes(UnloadAdapterBody),
        responses={200: {"model": UnloadedAdapter}, **failures(*_FAILURES, 404, 409)},
    )
    async def unload_lora_adapter(request: Request) -> Response:
        """Removes an adapter with all its versions and aliases, or one version of it."""
        service.keys.admit_admin(request)
        body = await read_body(request, UnloadAdapterBody, service.config)
        if service.names.parse(body.lora_name) is None:
            raise ApiError(400, f"'{body.lora_name}' is the base model", param="lora_name")
        try:
            async with turn():
                removed = await asyncio.to_thread(_remove, service, registry, body.lora_name)
        except AdapterNotFound as error:
            found = as_api_error(error, service.names)
            found.param = "lora_name"
            raise found from error
        return JSONResponse({"removed": removed})

    return router


def _add(
    service: Service, registry: Registry, config: ServeConfig, body: LoadAdapterBody
) -> AddedAdapter:
    """Raises AdapterError or ApiError 400 for what can't be served, Unavailable where the registry
    is away.
    """
    _check_registry(service)
    source = body.lora_path
    if body.lora_name == service.names.base_name:
        raise ApiError(
            400,
            f"'{body.lora_name}' is what the base model is called; give the adapter another name",
            param="lora_name",
        )
    try:
        check_name(body.lora_name[:_SHOWN])  # one that is longer is refused by that many, too
    except AdapterError as error:
        raise ApiError(400, str(error), param="lora_name", code="adapter_error") from error
    # A relative path would be one from wherever Ray started this process.
    if not source.startswith("/") and hub_id(source) != source:
        raise ApiError(
            400,
            f"lora_path '{source[:_SHOWN]}' is neither an absolute path on the server nor "
            "OWNER/NAME on the Hugging Face hub",
            param="lora_path",
        )
    try:
        return add_adapter(
            registry, source, body.lora_name, config, base_is_right=body.base_is_right
        )
    except AdapterError as error:
        message = service.names.public(str(error))
        if BASE_IS_RIGHT in str(error):
            message += '; where you know that it was trained on this base: "base_is_right": true'
        raise ApiError(400, message, param="lora_path", code="adapter_error") from error


def _check_registry(service: Service) -> None:
    """Raises Unavailable where the registry is away: writing would begin another in its place."""
    try:
        service.names.catalog.check()
    except StorageError as error:
        raise service.away(error) from error


def _remove(service: Service, registry: Registry, model: str) -> list[str]:
    """Raises AdapterNotFound, or ApiError 409 for a version that an alias points to."""
    _check_registry(service)
    ref = service.names.parse(model)
    assert ref is not None
    # What can't answer, as it is damaged or of another base, is what has to be removed.
    if (missing := service.names.missing(ref)) is not None:
        raise missing
    if ref.version is not None or ref.alias is not None:
        try:
            return [str(registry.remove(ref))]
        except AdapterError as error:
            raise ApiError(
                409, service.names.public(str(error)), param="lora_name", code="in_use"
            ) from error
    for alias in registry.aliases(ref.name):
        if alias != LATEST:
            registry.unalias(ref.name, alias)
    versions = registry.versions(ref.name)
    return [str(registry.remove(AdapterRef(ref.name, version=at))) for at in versions]
