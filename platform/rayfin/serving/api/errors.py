"""Write every error in OpenAI's envelope: {"error": {message, type, param, code}}."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from rayfin.config.problems import format_value
from rayfin.errors import (
    AdapterError,
    AdapterNotFound,
    ContextLengthError,
    EngineFailed,
    Overloaded,
    RayfinError,
    RequestError,
    StorageError,
    Unavailable,
    did_you_mean,
)
from rayfin.redaction import printable

if TYPE_CHECKING:
    from rayfin.serving.model_names import ModelNames

log = logging.getLogger(__name__)

CLIENT_GONE = 499
"""What a request whose client went away is counted as; no one is there to read it."""

CONTEXT_LENGTH = "context_length_exceeded"
"""OpenAI's code for a prompt that is too long, by which clients know to shorten it."""

CLOSE = {"connection": "close"}
"""Headers of an answer to a request that was not read to its end."""

_MOST_PROBLEMS = 5
_TOO_MANY = 200
_TYPES = ("str", "int", "bool")

# pydantic's own words for these are sentences, which begin with the Python class.
_MEASURED = {
    "too_short": "a {field_type} of at least {min_length}",
    "too_long": "a {field_type} of at most {max_length}",
    "string_too_short": "a text that isn't empty",
}


class ApiError(Exception):
    """A response other than success, with its status and what the client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def as_json(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": _type(self.status),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        # In ASCII: a name that the message repeats must not steer the terminal that shows it.
        body = json.dumps(self.as_json(), separators=(",", ":"))
        return Response(body, self.status, self.headers, "application/json")


def body_too_large(max_bytes: int) -> ApiError:
    """Returns the error for a body of more than `max_bytes`, after which nothing more is read."""
    return ApiError(
        413,
        f"the body is larger than {max_bytes} bytes; send less (max_body_bytes is the limit)",
        headers=CLOSE,
    )


def body_too_slow(seconds: float) -> ApiError:
    """Returns the error for a body that was not there after `seconds`."""
    return ApiError(
        408, f"the body did not come in within {seconds:g} s; send it faster", headers=CLOSE
    )


def server_failed(status: int = 500) -> ApiError:
    """Returns the error for what nobody foresaw: it tells nothing of the server's inside."""
    return ApiError(status, "the server failed; its log says why", code="internal_error")


def as_api_error(error: Exception, names: ModelNames) -> ApiError:
    """Return the HTTP response for an error; one that isn't ours is a 500 without its details."""
    found: tuple[int, str | None, str | None]
    match error:
        case ApiError():
            return error
        case AdapterNotFound():  # says what the client asked for, as it did
            message = names.public.without_places(str(error))
            return ApiError(404, message, param="model", code="model_not_found")
        case AdapterError():
            found = (400, "adapter_error", "model")
        case ContextLengthError() | RequestError():
            code = CONTEXT_LENGTH if isinstance(error, ContextLengthError) else None
            return ApiError(400, names.public.without_places(str(error)), code=code)
        case Overloaded():
            headers = {"retry-after": str(error.retry_after)}
            return ApiError(429, str(error), code="overloaded", headers=headers)
        case Unavailable():
            message, again = names.public.without_places(str(error)), {"retry-after": "1"}
            return ApiError(503, message, code="unavailable", headers=again)
        case StorageError():
            log.error("%s", printable(str(error)))
            message = "the server can't use its storage now, and its log says why; try again later"
            return ApiError(503, message, code="unavailable", headers={"retry-after": "1"})
        case EngineFailed():
            found = (500, "engine_error", None)
        case RayfinError():
            log.error("%s", error)
            found = (500, None, None)
        case _:
            return server_failed()
    status, code, param = found
    return ApiError(status, names.public(str(error)), param=param, code=code)


def describe_invalid(error: ValidationError) -> ApiError:
    """Say what is wrong with a body, in one line."""
    if error.error_count() > _TOO_MANY:  # to list them would take the time of everybody else
        return ApiError(
            400, f"the body has {error.error_count()} problems; is it for this endpoint?"
        )
    wanted: dict[tuple[str, str], list[str]] = {}
    sentences: list[str] = []
    first: str | None = None
    for problem in error.errors(include_url=False):
        # Between the fields pydantic names the members of a union, which are ours.
        location = [str(part)[:80] for part in problem["loc"] if part not in _TYPES]
        location = [part for part in location if "[" not in part]
        field = location[0] if location else "the body"
        first = first or (field if location else None)
        match problem["type"]:
            case "extra_forbidden":
                near = did_you_mean(field, _fields(error.title)) if len(location) == 1 else ""
                sentences.append(f"'{'.'.join(location)}' is no field of this request{near}")
            case "text_only":
                sentences.append(f"{'.'.join(location)}: {problem['msg']}")
            case "missing":
                sentences.append(f"{'.'.join(location)} is missing")
            case kind:
                words = problem["msg"].removeprefix("Input should be ")
                if kind in _MEASURED:
                    words = _MEASURED[kind].format(**problem["ctx"]).lower()
                # Every member of a union has its say: they are one problem.
                choices = wanted.setdefault((field, format_value(problem["input"])), [])
                if words not in choices:
                    choices.append(words)
    for (field, given), choices in wanted.items():
        allowed = " or ".join(choices[:_MOST_PROBLEMS])
        sentences.append(f"{field}: {given} is not allowed; it should be {allowed}")
    return ApiError(400, "; ".join(sentences[:_MOST_PROBLEMS]), param=first)


def handle_errors(app: FastAPI, names: ModelNames) -> None:
    async def ours(_: Request, error: Exception) -> Response:
        return as_api_error(error, names).response()

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = error.detail or HTTPStatus(error.status_code).phrase
        return ApiError(error.status_code, message, headers=error.headers).response()

    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    for kind in (ApiError, RayfinError, Exception):
        app.add_exception_handler(kind, ours)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientDisconnect, gone)


def _type(status: int) -> str:
    if status >= 500:
        return "server_error"
    names = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return names.get(status, "invalid_request_error")


def _fields(title: str) -> tuple[str, ...]:
    from rayfin.serving.api import schema

    model = getattr(schema, title, None)
    return tuple(model.model_fields) if model is not None else ()
