"""rayfin's part of Ray Serve's HTTP proxies: limits on clients, and one envelope for errors.

Serve calls `middlewares` in each proxy that starts with `ENVIRONMENT`. A request's body is read
here, so that one that trickles holds no place in an API replica; and what Serve says in its own
words (nothing is served while an application is deployed or deleted, a replica died) becomes an
error that OpenAI's clients understand, and try again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayfin.compat.uvicorn import use_protocol
from rayfin.config.serving import ApiConfig
from rayfin.serving import kv_store
from rayfin.serving.api.errors import (
    CLOSE,
    ApiError,
    body_too_large,
    body_too_slow,
    server_failed,
)
from rayfin.serving.api.request_log import request_id_of
from rayfin.serving.connections import MAX_HEAD_BYTES, TIMEOUTS, FairLimiter, client_of

log = logging.getLogger(__name__)

ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "rayfin.serving.proxy:middlewares",
}
"""The environment variables with which a proxy has to start."""

LIMITS = "limits"
"""The key under which an API replica leaves the deployment's limits for the proxies."""

_REFRESH_SECONDS = 5.0
_FIRST_READ_SECONDS = 2.0
_UPLOAD_BYTES = 512 * 2**20
"""The most memory that all bodies that are coming in may take."""
_FEWEST_UPLOADS = 64
_GRACE_SECONDS = 1.0
# Serve obeys these, and they are no client's business: a deadline of another's, a request that
# goes on when its client has left, and to which replica it goes.
_SERVES_OWN = (
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"x-session-id",
    b"serve_multiplexed_model_id",
    b"serve-multiplexed-model-id",
)
_SERVES_PAGES = ("/-/healthz", "/-/routes")
_LOST = ApiError(
    503,
    "the replica that answered this request is gone; send it again",
    code="replica_lost",
    headers={"retry-after": "1"},
)


def middlewares() -> list[Middleware]:
    """Returns what Serve's proxy process puts in front of its own application.

    Calling it also makes uvicorn use `BoundedProtocol` for every connection of this process.
    """
    # Serve names no protocol to uvicorn, which takes its default.
    use_protocol("rayfin.serving.connections:BoundedProtocol")
    return [Middleware(ProxyMiddleware, read_limits=lambda: kv_store.get(LIMITS))]


@dataclass(frozen=True)
class ClientLimits:
    """The deployment's settings that a proxy needs to know."""

    max_body_bytes: int
    body_seconds: float
    write_seconds: float
    max_client_uploads: int

    @classmethod
    def of(cls, config: ApiConfig) -> ClientLimits:
        return cls(
            config.max_body_bytes,
            config.body_seconds,
            config.write_seconds,
            config.max_client_uploads,
        )


def publish_limits(config: ApiConfig) -> None:
    """Writes the deployment's limits to where all proxies of this Ray cluster read them."""
    kv_store.put(LIMITS, asdict(ClientLimits.of(config)))


@dataclass(eq=False)
class _Upload:
    """A body that is coming in."""

    deadline: asyncio.Timeout
    displaced: bool = False

    def displace(self) -> None:
        """Ends the upload; one whose time is up anyway ends for that."""
        if self.deadline.expired():
            return
        self.displaced = True
        self.deadline.reschedule(asyncio.get_running_loop().time())


class ProxyMiddleware:
    """ASGI middleware in front of Serve's proxy, or of the API itself.

    `read_limits` returns the fields of `ClientLimits`, or None where nobody has written them yet.
    It may take its time or raise.
    """

    def __init__(self, app: ASGIApp, read_limits: Callable[[], Mapping[str, Any] | None]) -> None:
        self._app, self._read_limits = app, read_limits
        self._limits = ClientLimits.of(ApiConfig())
        self._read_at = 0.0
        self._reading: asyncio.Task[None] | None = None
        self._uploads: FairLimiter[_Upload] = FairLimiter(0, 0, _GRACE_SECONDS)
        self._apply(self._limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _SERVES_PAGES:
            await self._app(scope, receive, send)
            return
        answer = _ResponseSender(send, request_id_of(scope))
        try:
            await self._pass_on(scope, receive, answer)
            await answer.end(_LOST)
        except ApiError as error:
            await answer.end(error)
        except Exception:
            log.exception("request %s failed", answer.request_id)
            await answer.end(server_failed())

    async def _pass_on(self, scope: Scope, receive: Receive, answer: _ResponseSender) -> None:
        """Has the application answer; raises ApiError for a request that it is not to see."""
        await self._refresh()
        headers = scope["headers"]
        if sum(len(n) + len(v) + 4 for n, v in headers) > MAX_HEAD_BYTES:
            raise ApiError(
                431,
                f"the request's headers are larger than {MAX_HEAD_BYTES} bytes; send less",
                headers=CLOSE,
            )
        first = await self._first_message(scope, receive)
        kept = [(n, v) for n, v in headers if n not in _SERVES_OWN and n != b"x-request-id"]
        scope = {**scope, "headers": [*kept, (b"x-request-id", answer.request_id.encode())]}
        waiting = [] if first is None else [first]

        async def received() -> Message:
            return waiting.pop() if waiting else await receive()

        await self._app(scope, received, answer.send)

    # --- bodies -------------------------------------------------------------------------------

    async def _first_message(self, scope: Scope, receive: Receive) -> Message | None:
        """Returns a message with the whole body, or one that says that the client has gone.

        Returns None for a request without a body.

        Raises ApiError 408, 413 or 429.
        """
        given = {
            n: v for n, v in scope["headers"] if n in (b"content-length", b"transfer-encoding")
        }
        length = given.get(b"content-length", b"0")
        if b"transfer-encoding" not in given and length == b"0":
            return None
        limits = self._limits
        if length.isdigit() and int(length) > limits.max_body_bytes:
            raise body_too_large(limits.max_body_bytes)
        client = client_of(scope["client"])
        body = bytearray()
        upload: _Upload | None = None
        try:
            async with asyncio.timeout(limits.body_seconds) as deadline:
                upload = _Upload(deadline)
                for other in self._uploads.add(client, upload):
                    other.displace()
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return message
                    body += message.get("body", b"")
                    if len(body) > limits.max_body_bytes:
                        raise body_too_large(limits.max_body_bytes)
                    if not message.get("more_body", False):
                        return {"type": "http.request", "body": bytes(body), "more_body": False}
        except TimeoutError as error:
            if upload is not None and upload.displaced:
                raise ApiError(
                    429,
                    "too many bodies are coming in at a time, and this was the slowest; try again",
                    code="overloaded",
                    headers={"retry-after": "1", **CLOSE},
                ) from error
            raise body_too_slow(limits.body_seconds) from error
        finally:
            if upload is not None:
                self._uploads.remove(client, upload)

    # --- limits -------------------------------------------------------------------------------

    async def _refresh(self) -> None:
        """Wait for the first reading of the limits; later ones don't keep requests waiting."""
        first, now = self._reading is None, time.monotonic()
        if self._reading is None or (
            self._reading.done() and now - self._read_at > _REFRESH_SECONDS
        ):
            self._read_at = now
            self._reading = asyncio.create_task(self._read())
        if first:
            await asyncio.wait([self._reading], timeout=_FIRST_READ_SECONDS)

    async def _read(self) -> None:
        try:
            found = await asyncio.to_thread(self._read_limits) or {}
            # Another version of rayfin, whose replicas are being replaced, may say more or less.
            known = {
                each.name: found[each.name] for each in fields(ClientLimits) if each.name in found
            }
            self._apply(replace(self._limits, **known))
        except Exception as error:  # noqa: BLE001  # the head is away; what was known holds
            log.warning("the deployment's limits can't be read now: %s", error)

    def _apply(self, limits: ClientLimits) -> None:
        self._limits = limits
        TIMEOUTS.request, TIMEOUTS.answer = limits.body_seconds, limits.write_seconds
        self._uploads.most = max(_FEWEST_UPLOADS, _UPLOAD_BYTES // limits.max_body_bytes)
        self._uploads.most_of_one = limits.max_client_uploads


class _ResponseSender:
    """Sends one response to the client; an error in Serve's own words gets the envelope."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self._id_header = (b"x-request-id", request_id.encode())
        self._started = self._complete = self._events = False
        self._plain: Message | None = None
        """The start of an error that Serve says in plain text; `_text` is the rest of it."""
        self._text = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [(bytes(n).lower(), bytes(v)) for n, v in message["headers"]]
            kind = dict(headers).get(b"content-type", b"")
            if message["status"] >= 400 and kind.startswith(b"text/plain"):
                self._plain = message
                return
            self._events = kind.startswith(b"text/event-stream")
            headers = [*((n, v) for n, v in headers if n != b"x-request-id"), self._id_header]
            message = {**message, "headers": headers}
            self._started = True
        elif message["type"] == "http.response.body":
            more = message.get("more_body", False)
            if self._plain is not None:
                self._text += message.get("body", b"")
                if not more:
                    await self._refuse(_of_serve(self._plain, self._text))
                return
            self._complete = not more
        await self._send(message)

    async def end(self, error: ApiError) -> None:
        """Tells the client `error` where its answer is not complete.

        Where a part of it has been sent, only events have room for an error: everything else is
        left incomplete, and uvicorn closes the connection.
        """
        if self._complete:
            return
        if not self._started:
            await self._refuse(error)
        elif self._events:
            self._complete = True
            body = b"data: " + json.dumps(error.as_json()).encode() + b"\n\n"
            await self._send({"type": "http.response.body", "body": body})

    async def _refuse(self, error: ApiError) -> None:
        self._plain, self._started, self._complete = None, True, True
        response = error.response()
        headers = [*response.raw_headers, self._id_header]
        start = {"type": "http.response.start", "status": error.status, "headers": headers}
        await self._send(start)
        await self._send({"type": "http.response.body", "body": response.body})


def _of_serve(start: Message, text: bytes) -> ApiError:
    """Returns the error that an answer of Serve's own, in plain text, means."""
    status = start["status"]
    headers = {bytes(n).decode("latin-1"): bytes(v).decode("latin-1") for n, v in start["headers"]}
    again = {"retry-after": headers.get("retry-after", "1")}
    if status in (404, 503):
        return ApiError(
            503,
            "nothing is served here now: the deployment starts, stops or is replaced; try again",
            code="unavailable",
            headers=again,
        )
    if status == 429:
        return ApiError(
            429, "too many requests wait for the API; try again", code="overloaded", headers=again
        )
    message = text.decode("utf-8", "replace").partition("\n")[0][:200] if status < 500 else ""
    return ApiError(status, message) if message else server_failed(status)
