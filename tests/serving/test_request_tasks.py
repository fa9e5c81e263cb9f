"""The life cycle of requests that coroutines answer: each ends once, and its client is told how."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from rayfin.errors import EngineFailed, Overloaded, RayfinError, RequestError
from rayfin.serving.engine.request import Chunk, Request, SamplingParams, Sink
from rayfin.serving.engine.request_tasks import RequestTasks

LAST = Chunk("end", (2,), finish_reason="stop")


class Lab:
    """A loop on a thread of its own; what a request does is named by its id's first word."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.tasks = RequestTasks(self.loop, self._answer, self._failure)
        self.chunks: dict[str, list[Chunk]] = {}
        self.ended = threading.Semaphore(0)

    async def _answer(self, request: Request, sink: Sink) -> None:
        sink(Chunk("a", (1,)))
        match request.request_id.partition("-")[0]:
            case "fails":
                raise ValueError("a cable")
            case "ends":
                sink(LAST)
            case "late":
                sink(LAST)
                raise ValueError("after all")
            case "waits":
                await asyncio.sleep(3600)

    @staticmethod
    def _failure(error: BaseException) -> RayfinError:
        return EngineFailed(f"it failed ({error})")

    def sink(self, request_id: str, chunk: Chunk) -> None:
        self.chunks.setdefault(request_id, []).append(chunk)
        if chunk.finish_reason is not None:
            self.ended.release()
        if request_id.endswith("deaf"):
            raise OSError("nobody is there")

    def ask(self, request_id: str, most: int = 10) -> None:
        request = Request(request_id, (1,), SamplingParams())
        self.tasks.submit(request, lambda chunk: self.sink(request_id, chunk), most=most)

    def last(self, request_id: str) -> Chunk:
        """The last chunk of a request that has ended, after which none may come."""
        assert self.ended.acquire(timeout=540)
        self.tasks.drain(30)
        # What the loop was at is done: no task is left that could give the sink another chunk.
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self.loop).result(540)
        given = self.chunks[request_id]
        assert [chunk.finish_reason is not None for chunk in given[:-1]] == [False] * len(
            given[:-1]
        )
        return given[-1]


@pytest.fixture
def lab() -> Iterator[Lab]:
    lab = Lab()
    yield lab
    asyncio.run_coroutine_threadsafe(lab.tasks.cancel_all(), lab.loop).result(540)
    lab.loop.call_soon_threadsafe(lab.loop.stop)
    lab.thread.join()
    lab.loop.close()


@pytest.mark.parametrize(
    ("request_id", "reason", "says"),
    [
        ("ends", "stop", None),
        ("ends-deaf", "error", "nobody is there"),  # at its first chunk
        ("late", "stop", None),
        ("fails", "error", "it failed (a cable)"),
        ("stops short", "error", "the answer broke off; send the request again"),
    ],
)
def test_every_request_ends_once(lab: Lab, request_id: str, reason: str, says: str | None) -> None:
    lab.ask(request_id)
    last = lab.last(request_id)
    assert last.finish_reason == reason
    assert (None if last.error is None else says in str(last.error)) == (says and True)
    assert (len(lab.tasks), lab.tasks.finished) == (0, 1)


def test_a_cancelled_request_ends_too(lab: Lab) -> None:
    lab.tasks.cancel("nobody's")
    lab.ask("waits")
    lab.tasks.cancel("waits")
    assert lab.last("waits").finish_reason == "cancelled"


def test_what_is_too_much_is_refused(lab: Lab) -> None:
    lab.ask("waits-1")
    with pytest.raises(RequestError, match="in use"):
        lab.ask("waits-1")
    with pytest.raises(Overloaded, match="1 requests are at work"):
        lab.ask("waits-2", most=1)
    lab.ask("waits-2", most=2)
    lab.tasks.drain(0)
    with pytest.raises(Overloaded, match="no requests any more"):
        lab.ask("waits-3")
    asyncio.run_coroutine_threadsafe(lab.tasks.cancel_all(), lab.loop).result(540)
    assert {lab.last(name).finish_reason for name in ("waits-1", "waits-2")} == {"cancelled"}
