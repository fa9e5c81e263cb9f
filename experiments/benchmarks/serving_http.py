"""The serving benchmark's HTTP side: the API beside its engine, and a client in its own process."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@contextmanager
def http_throughput(
    engine: Any, adapters: Sequence[Any], prompts: Sequence[list[int]], tokens: int
) -> Iterator[Callable[..., tuple[float, list[list[int]]]]]:
    """Gives a function that asks everything at once and returns seconds and tokens of each answer.

    Tokens are counted by the server's own usage, as a client does.
    """
    import uvicorn

    from rayfin.adapters import Registry
    from rayfin.config.serving import ApiConfig
    from rayfin.serving.api.app import create_app
    from rayfin.serving.names import Names

    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(Path(folder))
        for source in adapters:
            registry.publish(source.ref.partition("@")[0], source.path)
        app = create_app(engine, Names(registry, engine.model_name), ApiConfig())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = uvicorn.Server(
            uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", access_log=False)
        )
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        bodies = [
            {
                "model": adapters[i % len(adapters)].ref,
                "prompt": prompt,
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            for i, prompt in enumerate(prompts)
        ]
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        client = context.Process(target=_client, args=(theirs, port, bodies), daemon=True)
        client.start()

        def ask(*, stream: bool) -> tuple[float, list[list[int]]]:
            ours.send(stream)
            seconds, counts = ours.recv()
            return seconds, [[0] * count for count in counts]

        try:
            yield ask
        finally:
            ours.send(None)
            client.join(10)
            server.should_exit = True
            thread.join(10)


def _client(pipe: Connection, port: int, bodies: Sequence[dict[str, Any]]) -> None:
    """Runs in its own process; each message is `stream` or not, None to end."""
    url = f"http://127.0.0.1:{port}/v1/completions"
    with asyncio.Runner() as runner:
        while (stream := pipe.recv()) is not None:
            pipe.send(runner.run(_ask_all(url, bodies, stream)))


async def _ask_all(
    url: str, bodies: Sequence[dict[str, Any]], stream: bool
) -> tuple[float, list[int]]:
    import httpx

    async with httpx.AsyncClient(timeout=600) as client:
        started = time.perf_counter()
        counts = await asyncio.gather(*(_ask(client, url, body, stream) for body in bodies))
        return time.perf_counter() - started, list(counts)


async def _ask(client: Any, url: str, body: dict[str, Any], stream: bool) -> int:
    import json

    if not stream:
        answer = (await client.post(url, json=body)).raise_for_status().json()
        return int(answer["usage"]["completion_tokens"])
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    tokens = 0
    async with client.stream("POST", url, json=asked) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {") and (usage := json.loads(line[6:]).get("usage")):
                tokens = int(usage["completion_tokens"])
    return tokens
