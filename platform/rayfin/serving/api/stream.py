"""Bring the chunks of one HTTP request from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from functools import partial

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from rayfin.serving.api.protocol import ServedEngine
from rayfin.serving.engine.request import Chunk, Request


class Generation:
    """The sequences of one HTTP request, as an async iterator of (its index, a chunk of it).

    It ends when every sequence has, or at once when it is closed; a closed one has left the
    engine. Of one event loop; `start` must be followed by `close`.
    """

    def __init__(self, engine: ServedEngine, requests: Sequence[Request]) -> None:
        self._engine, self._requests = engine, requests
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[tuple[int, Chunk] | None] = asyncio.Queue()
        self._open: dict[int, str] = {}
        """Index -> request id of what the engine still works on."""
        self._watcher: asyncio.Task[None] | None = None
        self.closed = False
        """Closed before all sequences had ended, because the client went away, say."""

    def start(self, receive: Receive) -> None:
        """Submits every sequence or none; raises what the engine does.

        `receive` is the HTTP request's, its body read: a client that goes away closes this.
        """
        try:
            for index, request in enumerate(self._requests):
                self._engine.submit(request, partial(self._sink, index))
                self._open[index] = request.request_id
        except BaseException:
            self.close()
            raise
        self._watcher = self._loop.create_task(self._watch(receive))

    def close(self) -> None:
        """Frees what the engine still works on."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        if self._open:
            self.closed = True
            for request_id in self._open.values():
                self._engine.cancel(request_id)
            self._open.clear()
            self._arrived.put_nowait(None)

    def __aiter__(self) -> AsyncIterator[tuple[int, Chunk]]:
        return self

    async def __anext__(self) -> tuple[int, Chunk]:
        if self._arrived.empty() and not self._open:
            raise StopAsyncIteration
        arrived = await self._arrived.get()
        if arrived is None:
            raise StopAsyncIteration
        return arrived

    def _sink(self, index: int, chunk: Chunk) -> None:
        # On the engine's thread. A loop that is closed has nobody left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._take, index, chunk)

    def _take(self, index: int, chunk: Chunk) -> None:
        if self.closed:
            return
        if chunk.finish_reason is not None:
            self._open.pop(index, None)
        self._arrived.put_nowait((index, chunk))

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._watcher = None
        self.close()


class EventStream(Response):
    """A response of server-sent events; `generation` is closed however sending them ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], generation: Generation) -> None:
        self.background = None
        self.status_code = 200
        # Proxies must hand events on as they come.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events, self._generation = events, generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._generation.close()
