"""The life cycle of requests that coroutines of one event loop answer, whoever computes them."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial

from rayfin.errors import EngineFailed, Overloaded, RayfinError, RequestError
from rayfin.serving.engine.request import Chunk, Request, Sink

log = logging.getLogger(__name__)


class RequestTasks:
    """Admits requests, answers each in a task of its own, and sees to it that each one ends.

    A request's sink gets one chunk with a finish reason, however its task ends: the task's own,
    `cancelled`, or the error of a task that fails or stops short of the last chunk. `submit`,
    `cancel` and `drain` may be called from any thread.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        answer: Callable[[Request, Sink], Awaitable[None]],
        failure: Callable[[BaseException], RayfinError],
    ) -> None:
        """`answer` hands a request's chunks to the sink that it is given, and may raise anything.

        `failure` returns what the client is told of an exception that `answer` raised.
        """
        self._loop, self._answer, self._failure = loop, answer, failure
        self._changed = threading.Condition()
        self._open: dict[str, asyncio.Task[None] | None] = {}
        """Request id -> the task that answers it; None until the event loop has begun it."""
        self._draining = False
        self.finished = 0
        """Requests that have ended, in any way."""

    def __len__(self) -> int:
        """Return the number of requests that have not ended."""
        return len(self._open)

    def submit(self, request: Request, sink: Sink, *, most: int) -> None:
        """Begin to answer a request.

        Raises RequestError for an id that is in use, and Overloaded where `most` requests are open
        already, or after `drain`.
        """
        with self._changed:
            if self._draining:
                raise no_more_requests()
            if request.request_id in self._open:
                raise RequestError(f"request id '{request.request_id}' is in use; give another")
            if len(self._open) >= most:
                raise Overloaded(f"{len(self._open)} requests are at work or wait; try again soon")
            self._open[request.request_id] = None
            # With the lock held, so that `drain` finds it: whoever closes the loop drains first.
            self._loop.call_soon_threadsafe(self._begin, request, sink)

    def cancel(self, request_id: str) -> None:
        """End a request; one that isn't there is no error."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nothing is left
            self._loop.call_soon_threadsafe(self._cancel, request_id)

    def drain(self, seconds: float) -> None:
        """Refuse new requests, and return when all have ended or `seconds` have passed."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._draining = True
            while self._open and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)

    async def cancel_all(self) -> None:
        """End every request, and return when their tasks have ended."""
        tasks = [task for task in self._open.values() if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- in the event loop --------------------------------------------------------------------

    def _begin(self, request: Request, sink: Sink) -> None:
        delivery = _Delivery(request.request_id, sink)
        # A context of its own: calls that share one HTTP request's would share Serve's id for it,
        # and Serve's router could take one for another.
        task = self._loop.create_task(
            self._follow(request, delivery), context=contextvars.Context()
        )
        with self._changed:
            self._open[request.request_id] = task
        task.add_done_callback(partial(self._ended, delivery))

    async def _follow(self, request: Request, delivery: _Delivery) -> None:
        await self._answer(request, delivery.hand_on)

    def _cancel(self, request_id: str) -> None:
        if (task := self._open.get(request_id)) is not None:
            task.cancel()

    def _ended(self, delivery: _Delivery, task: asyncio.Task[None]) -> None:
        with self._changed:
            self._open.pop(delivery.request_id, None)
            self.finished += 1
            self._changed.notify_all()
        error = None if task.cancelled() else task.exception()
        why = None if error is None else self._failure(error)
        if why is not error:
            log.warning("request %s failed: %s", delivery.request_id, error)
        if delivery.ended:
            return
        if task.cancelled():
            last = Chunk("", (), finish_reason="cancelled")
        else:
            why = why or EngineFailed("the answer broke off; send the request again")
            last = Chunk("", (), finish_reason="error", error=why)
        delivery.finish(last)


class _Delivery:
    """Hands one request's chunks to its sink, and knows whether the last one was among them."""

    def __init__(self, request_id: str, sink: Sink) -> None:
        self.request_id, self._sink = request_id, sink
        self.ended = False

    def hand_on(self, chunk: Chunk) -> None:
        """Give the sink a chunk; raises what the sink does, unless the chunk is the last one."""
        if chunk.finish_reason is None:
            self._sink(chunk)
        else:
            self.finish(chunk)

    def finish(self, chunk: Chunk) -> None:
        """Give the sink the last chunk; a sink that fails at it is logged."""
        self.ended = True
        try:
            self._sink(chunk)
        except Exception:
            log.exception("request %s: its sink failed", self.request_id)


def no_more_requests() -> Overloaded:
    """Return the error for a request to an engine that has stopped or is about to."""
    return Overloaded("the engine takes no requests any more", retry_after=5)
