"""A client that goes away frees its row at once, whatever it was waiting for."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from rayfin.errors import Overloaded, RequestError
from rayfin.serving.api.stream import Generation
from rayfin.serving.engine.request import Request, SamplingParams

LENGTH = 4096
LONG = {"model": "tiny", "prompt": "hi", "max_tokens": 10**6, "ignore_eos": True}


@pytest.fixture
def crowded(tools: Any, engines: Any, tiny: str, shared_registry: Any) -> Iterator[Any]:
    """A server with two rows, and answers that take a while."""
    engine = engines(tiny, max_rows=2, max_length=LENGTH)
    with tools.serving(engine, shared_registry, tools.ApiConfig()) as server:
        yield server


def at_work(server: Any) -> tuple[int, int]:
    stats = server.engine.stats()
    return stats.running, stats.waiting


def generated(engine: Any) -> int:
    """Tokens so far. Nothing else tells a row that was freed from one that ran to its end."""
    count: int = engine.stats().generated_tokens
    return count


class Caller:
    """A client that asks in a thread of its own, and can hang up."""

    def __init__(self, server: Any, **body: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._ask(server.url, {**LONG, **body}))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def hang_up(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(540)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        finally:
            self._loop.close()

    async def _ask(self, url: str, body: dict[str, Any]) -> None:
        async with (
            httpx.AsyncClient(base_url=url, timeout=540) as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            async for _ in response.aiter_raw():
                pass


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_rows(tools: Any, crowded: Any, stream: bool) -> None:
    for _ in range(3):
        before = generated(crowded.engine)
        caller = Caller(crowded, stream=stream, n=2, model="support")
        tools.wait_until(lambda: at_work(crowded) == (2, 0), "it decodes")
        caller.hang_up()
        tools.wait_until(lambda: at_work(crowded) == (0, 0), "its rows are free")
        assert generated(crowded.engine) - before < LENGTH
    assert crowded.complete(ignore_eos=True).json()["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_leaves_the_queue(tools: Any, crowded: Any, stream: bool) -> None:
    before = generated(crowded.engine)
    busy = Caller(crowded, stream=True, n=2)
    tools.wait_until(lambda: at_work(crowded) == (2, 0), "the rows are taken")
    waiting = Caller(crowded, stream=stream, n=3)
    tools.wait_until(lambda: at_work(crowded) == (2, 3), "others wait")
    waiting.hang_up()
    tools.wait_until(lambda: at_work(crowded) == (2, 0), "they have left")
    busy.hang_up()
    tools.wait_until(lambda: at_work(crowded) == (0, 0), "nothing is left")
    assert generated(crowded.engine) - before < 2 * LENGTH - 1000


def test_many_clients_that_hang_up_leave_nothing(tools: Any, crowded: Any) -> None:
    before = generated(crowded.engine)
    callers = [Caller(crowded, stream=bool(i % 2), model="support") for i in range(20)]
    tools.wait_until(lambda: sum(at_work(crowded)) == 20, "all are there")
    for caller in callers:
        caller.hang_up()
    tools.wait_until(lambda: at_work(crowded) == (0, 0), "nothing is left")
    labels = '{adapter="support",status="499"}'
    tools.wait_until(
        lambda: f"rayfin_requests_total{labels} 20.0" in crowded.http.get("/metrics").text,
        "all are counted as gone",
    )
    assert generated(crowded.engine) - before < 20 * LENGTH / 2


async def never() -> Any:
    await asyncio.Event().wait()


def request(name: str, tokens: int, prompt: tuple[int, ...] = (65, 66)) -> Request:
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    return Request(name, prompt, params)


def test_a_generation_ends_when_its_sequences_have(engine: Any) -> None:
    async def tokens() -> tuple[list[int], bool]:
        generation = Generation(engine, [request("whole-0", 3), request("whole-1", 5)])
        generation.start(never)
        counts = [0, 0]
        async for index, chunk in generation:
            counts[index] += len(chunk.token_ids)
        generation.close()
        return counts, generation.closed

    assert asyncio.run(tokens()) == ([3, 5], False)


def test_a_closed_generation_wakes_its_reader(tools: Any, engine: Any) -> None:
    async def read() -> int:
        generation = Generation(engine, [request("closed", 400)])
        generation.start(never)
        await anext(generation)
        reader = asyncio.ensure_future(_count(generation))
        await asyncio.sleep(0)
        generation.close()
        generation.close()
        return await reader

    async def _count(generation: Generation) -> int:
        return sum([1 async for _ in generation])

    assert asyncio.run(read()) < 400
    tools.wait_until(lambda: engine.stats().running == 0, "its row is free")


def test_all_sequences_are_taken_or_none(tools: Any, engine: Any) -> None:
    before = generated(engine)

    async def submit() -> None:
        generation = Generation(engine, [request("good", 400), request("bad", 1, prompt=())])
        generation.start(never)

    with pytest.raises(RequestError):
        asyncio.run(submit())
    tools.wait_until(lambda: sum((engine.stats().running, engine.stats().waiting)) == 0, "none")
    assert generated(engine) - before < 400


def test_chunks_after_the_loop_has_ended_disturb_no_one(tools: Any, engine: Any) -> None:
    async def leave() -> None:
        Generation(engine, [request("left", 50)]).start(never)

    asyncio.run(leave())
    tools.wait_until(lambda: engine.stats().running + engine.stats().waiting == 0, "it has ended")
    assert engine.failure is None


def test_a_queue_that_is_full_is_the_engines_to_refuse(engines: Any, tiny: str) -> None:
    engine = engines(tiny, max_rows=1, max_queue=2)

    async def submit() -> None:
        Generation(engine, [request(f"many-{i}", 2000) for i in range(8)]).start(never)

    with pytest.raises(Overloaded):
        asyncio.run(submit())
