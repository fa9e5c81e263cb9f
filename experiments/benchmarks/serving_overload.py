"""`rayfin serve` at ten times its capacity for a minute: memory, refusals, speed before and after.

    python experiments/benchmarks/serving_overload.py [--quick]

SmolLM2 with one adapter, one engine replica of 8 rows and a queue of 8; 160 clients that ask again
50 ms after they were refused, whatever the server said. Everything over HTTP.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import parse_arguments, print_figure, spread
from serving_sides import make_adapters

ROWS, QUEUE, TOKENS = 8, 8, 16
CLIENTS = 10 * (ROWS + QUEUE)


def main() -> None:
    args = parse_arguments(__doc__ or "")
    seconds, rounds = (10.0, 3) if args.quick else (60.0, 7)
    with tempfile.TemporaryDirectory() as folder:
        from rayfin.adapters import Registry
        from rayfin.config import load_serve_config
        from rayfin.serving.deployment_lifecycle import serving

        adapter = make_adapters(Path(folder) / "made", 1, 8)[0]
        Registry(Path(folder) / "adapters").publish("one", adapter.path)
        settings = [
            f"storage={folder}",
            f"engine.max_rows={ROWS}",
            f"engine.max_queue={QUEUE}",
            "engine.max_length=512",
            "deployment.port=8765",
        ]
        with serving(load_serve_config(None, settings), None) as deployed:
            asyncio.run(measure(deployed.url, seconds, rounds))


async def measure(url: str, seconds: float, rounds: int) -> None:
    import httpx

    async with httpx.AsyncClient(
        base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)
    ) as http:
        await full_speed(http)
        before = [await full_speed(http) for _ in range(rounds)]
        statuses, unhelpful, memory = await overload(http, seconds)
        after = [await full_speed(http) for _ in range(rounds)]
        print(f"\n{CLIENTS} clients for {seconds:.0f} s: {dict(statuses)}")
        print(f"429 without Retry-After: {unhelpful}")
        print(f"memory of all processes, MiB, every 5 s: {memory}")
        print(f"tokens/s before {spread(before, 1)}, after {spread(after, 1)}")
        ratio = statistics.median(after) / statistics.median(before)
        print_figure("serving_overload", "speed_after_vs_before", ratio, "ratio", 0.9)
        others = sum(count for status, count in statuses.items() if status not in (200, 429))
        print_figure("serving_overload", "neither_200_nor_429", others, "requests", 0.0, most=True)
        growth = float(memory[-1] - memory[len(memory) // 4])
        print_figure("serving_overload", "memory_growth", growth, "MiB", 64.0, most=True)
        await leave(http)


async def full_speed(http: Any) -> float:
    """Tokens a second of as many requests as there are rows."""
    started = time.perf_counter()
    answers = await asyncio.gather(*(ask(http) for _ in range(ROWS)))
    assert all(answer.status_code == 200 for answer in answers)
    return ROWS * TOKENS / (time.perf_counter() - started)


async def ask(http: Any) -> Any:
    body = {"model": "one", "prompt": "Why is the sky blue?", "max_tokens": TOKENS}
    return await http.post("/v1/completions", json=body | {"temperature": 0, "ignore_eos": True})


async def overload(http: Any, seconds: float) -> tuple[Counter[int], int, list[int]]:
    """Answers by status, refusals that did not say when to come again, memory in MiB."""
    statuses: Counter[int] = Counter()
    memory: list[int] = []
    unhelpful = 0
    until = time.monotonic() + seconds

    async def insist() -> None:
        nonlocal unhelpful
        while time.monotonic() < until:
            response = await ask(http)
            statuses[response.status_code] += 1
            if response.status_code == 429:
                unhelpful += "retry-after" not in response.headers
                await asyncio.sleep(0.05)

    async def watch() -> None:
        while time.monotonic() < until:
            memory.append(served_memory() >> 20)
            await asyncio.sleep(min(5.0, seconds / 4))

    await asyncio.gather(watch(), *(insist() for _ in range(CLIENTS)))
    return statuses, unhelpful, memory


def served_memory() -> int:
    """Resident bytes of this process's replicas."""
    import psutil

    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            if any("ServeReplica" in part for part in process.cmdline()):
                total += process.memory_info().rss
        except psutil.Error:
            continue
    return total


async def leave(http: Any) -> None:
    """200 clients that go away in the middle of a stream, and the rows that they leave behind."""

    async def one() -> None:
        while True:
            body = {"model": "one", "prompt": "Tell me a story.", "max_tokens": 400, "stream": True}
            async with http.stream(
                "POST", "/v1/completions", json=body | {"ignore_eos": True}
            ) as r:
                if r.status_code == 200:
                    async for line in r.aiter_lines():
                        if line.startswith("data: "):
                            return
            await asyncio.sleep(0.05)

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(200)))
    gone = time.perf_counter()
    occupied = 1
    while occupied and time.perf_counter() - gone < 60:
        await asyncio.sleep(0.1)
        health = (await http.get("/health")).json()
        occupied = health["running"] + health["waiting"]
    print(f"\n200 clients left mid-stream within {gone - started:.1f} s;", end=" ")
    print(f"{time.perf_counter() - gone:.1f} s later {occupied} rows were occupied")
    print_figure("serving_overload", "rows_left_occupied", occupied, "rows", 0.0, most=True)


if __name__ == "__main__":
    main()
