"""Read a request's body, no more of it, and no longer or deeper, than is allowed."""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError

from rayfin.config.serving import ApiConfig
from rayfin.serving.api.errors import ApiError, body_too_large, body_too_slow, describe_invalid
from rayfin.serving.api.schema import NOT_SUPPORTED, Body

# More than any request has: what is wrong with each would take its time to say.
_MOST_FIELDS = 64

AnyBody = TypeVar("AnyBody", bound=Body)


async def read_body(request: Request, kind: type[AnyBody], config: ApiConfig) -> AnyBody:
    """Return the body as `kind`; raises ApiError 400, 408 or 413."""
    value = parse_json(await _read(request, config))
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    if len(value) > _MOST_FIELDS:
        raise ApiError(400, f"the body has {len(value)} fields; at most {_MOST_FIELDS} are read")
    for field in NOT_SUPPORTED.keys() & value.keys() - kind.model_fields.keys():
        if (given := value.pop(field)) is not None and given not in NOT_SUPPORTED[field]:
            raise ApiError(
                400, f"'{field}' is not supported by this server; leave it out", param=field
            )
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise describe_invalid(error) from error


async def _read(request: Request, config: ApiConfig) -> bytes:
    most = config.max_body_bytes
    if (length := request.headers.get("content-length", "")).isdecimal() and int(length) > most:
        raise body_too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(config.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise body_too_large(most)
    except TimeoutError as error:
        raise body_too_slow(config.body_seconds) from error
    return bytes(body)


def parse_json(body: bytes) -> Any:
    """Raises ApiError for anything but plain JSON: NaN and half characters are none."""
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse)
        if "\\u" in text:
            # An escape can write half of a surrogate pair, which is no text.
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error
    except ValueError as error:
        reason = str(error).partition("\n")[0][:120]
        raise ApiError(400, f"the body is not valid JSON ({reason})") from error
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
