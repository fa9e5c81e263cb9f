"""Loading and unloading adapters over HTTP, behind a token of its own."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from rayfin.adapters import LATEST, AdapterRef, Registry, check_name
from rayfin.errors import AdapterError
from rayfin.serving.api.bodies import read_body
from rayfin.serving.api.documents import LoadedAdapter, UnloadedAdapter, failures, takes
from rayfin.serving.api.errors import ApiError
from rayfin.serving.api.schema import LoadAdapterBody, UnloadAdapterBody
from rayfin.serving.api.service import Service
from rayfin.serving.engine.request import AdapterSource

_FAILURES = (400, 401, 403, 408, 413)


def admin_routes(service: Service) -> APIRouter:
    router = APIRouter()
    registry = Registry(service.names.catalog.root)
    # The registry's writers take turns anyway, and waiting here holds no thread.
    turn = asyncio.Lock()

    @router.post(
        "/v1/load_lora_adapter",
        openapi_extra=takes(LoadAdapterBody),
        responses={200: {"model": LoadedAdapter}, **failures(*_FAILURES)},
    )
    async def load_lora_adapter(request: Request) -> Response:
        """Publishes a directory on the server as the next version of an adapter."""
        service.keys.admit_admin(request)
        body = await read_body(request, LoadAdapterBody, service.config)
        async with turn:
            ref = await asyncio.to_thread(
                _publish, service, registry, body.lora_name, Path(body.lora_path)
            )
        return JSONResponse({"lora_name": ref})

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
        async with turn:
            removed = await asyncio.to_thread(_remove, service, registry, body.lora_name)
        return JSONResponse({"removed": removed})

    return router


def _publish(service: Service, registry: Registry, name: str, directory: Path) -> str:
    """Raises AdapterError for what can't be published or served."""
    check_name(name)
    service.names.catalog.check()
    try:
        found = directory.is_dir()
    except (OSError, ValueError):  # a name no file can have
        found = False
    if not found:
        raise AdapterError(f"'{directory}' is no directory on the server")
    # Under a name of its own: what the engine keeps by name must never be another's weights.
    service.engine.check(AdapterSource(f"{name}@upload-{secrets.token_hex(8)}", directory))
    return registry.publish(name, directory).ref


def _remove(service: Service, registry: Registry, model: str) -> list[str]:
    """Raises AdapterNotFound, or ApiError 409 for a version that an alias points to."""
    service.names.catalog.check()
    ref = service.names.parse(model)
    assert ref is not None
    if ref.version is not None or ref.alias is not None:
        service.names.resolve(model, anew=True)
        try:
            return [str(registry.remove(ref))]
        except AdapterError as error:
            raise ApiError(
                409, service.names.public(str(error)), param="lora_name", code="in_use"
            ) from error
    if not registry.versions(ref.name):
        service.names.resolve(model, anew=True)
    for alias in registry.aliases(ref.name):
        if alias != LATEST:
            registry.unalias(ref.name, alias)
    versions = registry.versions(ref.name)
    return [str(registry.remove(AdapterRef(ref.name, version=at))) for at in versions]
