"""More than it can take is refused, with the time to wait and in bounded memory; no row stays.

How fast it is afterwards is measured by experiments/benchmarks/serving_overload.py.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from rayfin.adapters import Registry
from rayfin.serving.engine.request import AdapterSource

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROWS, QUEUE, REPLICAS = 4, 4, 2
CLIENTS = 10 * (ROWS + QUEUE) * REPLICAS
SECONDS = 12.0
SETTLED = 4.0
"""Seconds after which memory should not grow any more, but for ..."""
SLACK = 64 * 2**20
LEAVING = 200
LONG = 4000


@pytest.fixture(scope="module")
def service(
    lab: Any,
    tiny: str,
    tiny_adapters: dict[str, AdapterSource],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    storage = tmp_path_factory.mktemp("served")
    Registry(storage / "adapters").publish("red", tiny_adapters["lora"].path)
    service = lab.Service(tiny, storage, max_rows=ROWS, max_queue=QUEUE, max_length=4096)
    yield service
    service.close()


def body(tokens: int, **more: Any) -> dict[str, Any]:
    asked = {"model": "red", "prompt": "Hello", "max_tokens": tokens, "temperature": 0}
    return asked | {"ignore_eos": True} | more


def client(service: Any) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=service.told["url"], timeout=120, limits=limits)


def test_ten_times_too_much_is_refused_in_bounded_memory(service: Any) -> None:
    statuses: Counter[int] = Counter()
    memory: list[int] = []
    processes = [p for name in ("api", "engine") for p in service.replicas(name)]

    async def insist(http: httpx.AsyncClient, until: float) -> None:
        while time.monotonic() < until:
            response = await http.post("/v1/completions", json=body(32))
            statuses[response.status_code] += 1
            if response.status_code == 429:
                assert int(response.headers["retry-after"]) >= 1
                assert response.json()["error"]["message"]
                await asyncio.sleep(0.05)  # a client that does not do as it is told

    async def watch(until: float) -> None:
        await asyncio.sleep(SETTLED)
        while time.monotonic() < until:
            memory.append(sum(process.memory_info().rss for process in processes))
            await asyncio.sleep(0.5)

    async def overload() -> None:
        until = time.monotonic() + SECONDS
        async with client(service) as http:
            await asyncio.gather(watch(until), *(insist(http, until) for _ in range(CLIENTS)))

    asyncio.run(overload())
    assert set(statuses) == {200, 429}
    assert max(memory) - memory[0] < SLACK, [m // 2**20 for m in memory]
    service.until(lambda: service.count("running") == service.count("waiting") == 0)
    assert all(answer.status_code == 200 for answer in service.at_once(ROWS, "red"))


def test_clients_that_leave_mid_stream_leave_no_row_occupied(service: Any) -> None:
    before = service.count("generated_tokens")
    begun: list[int] = []

    async def leave(http: httpx.AsyncClient) -> None:
        while True:
            async with http.stream(
                "POST", "/v1/completions", json=body(LONG, stream=True)
            ) as response:
                if response.status_code == 200:
                    async for line in response.aiter_lines():
                        if line.startswith("data: "):
                            begun.append(1)
                            return
                assert response.status_code == 429
            await asyncio.sleep(0.05)

    async def all_leave() -> None:
        async with client(service) as http:
            await asyncio.gather(*(leave(http) for _ in range(LEAVING)))

    asyncio.run(all_leave())
    assert len(begun) == LEAVING
    service.until(lambda: service.count("running") == service.count("waiting") == 0)
    assert service.count("generated_tokens") - before < LEAVING * LONG / 2
    # As many as there are rows and places in the queues of one replica: none may be taken.
    answers = service.at_once(ROWS + QUEUE, "red")
    assert [answer.status_code for answer in answers] == [200] * (ROWS + QUEUE)
