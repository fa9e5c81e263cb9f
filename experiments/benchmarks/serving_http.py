"""The serving benchmark's HTTP side: `rayfin serve`, the API alone, and what asks them."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Ask = Callable[..., tuple[float, list[list[int]]]]


@contextmanager
def deployment(adapters: Sequence[Any], settings: dict[str, Any]) -> Iterator[str]:
    """The URL of `rayfin serve`, Ray Serve and all, with these adapters."""
    with tempfile.TemporaryDirectory() as folder:
        _publish(adapters, Path(folder) / "adapters")
        given = {"storage": folder, "deployment.port": _free_port()} | settings
        command = [sys.executable, "-m", "rayfin", "serve", "--json"]
        command += [f"{key}={value}" for key, value in given.items()]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                yield str(json.loads(process.stdout.readline())["url"])
            finally:
                process.send_signal(signal.SIGTERM)


@contextmanager
def api_alone(engine: Any, adapters: Sequence[Any]) -> Iterator[str]:
    """The URL of the same API in a thread beside `engine`, without Ray Serve."""
    import uvicorn

    from rayfin.adapters import Registry
    from rayfin.config.serving import ServeConfig
    from rayfin.serving.api.app import create_app
    from rayfin.serving.model_names import ModelNames

    with tempfile.TemporaryDirectory() as folder:
        _publish(adapters, Path(folder))
        names = ModelNames(Registry(Path(folder)), engine.model_name)
        port = _free_port()
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(engine, names, ServeConfig()),
                host="127.0.0.1",
                port=port,
                log_level="error",
                access_log=False,
            )
        )
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(10)


@contextmanager
def clients(adapters: Sequence[Any], prompts: Sequence[list[int]], tokens: int) -> Iterator[Ask]:
    """Gives `ask(url, stream=)`: everything at once, in seconds and tokens of each answer.

    They live in a process of their own and count tokens by the server's usage, as clients do.
    """
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
    process = context.Process(target=_client, args=(theirs, bodies), daemon=True)
    process.start()

    def ask(url: str, *, stream: bool) -> tuple[float, list[list[int]]]:
        ours.send((f"{url}/v1/completions", stream))
        seconds, counts = ours.recv()
        return seconds, [[0] * count for count in counts]

    try:
        yield ask
    finally:
        ours.send(None)
        process.join(10)


def _publish(adapters: Sequence[Any], folder: Path) -> None:
    from rayfin.adapters import Registry

    registry = Registry(folder)
    for source in adapters:
        registry.publish(source.ref.partition("@")[0], source.path)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _client(pipe: Connection, bodies: Sequence[dict[str, Any]]) -> None:
    """Runs in its own process; each message is a URL and `stream` or not, None to end."""
    with asyncio.Runner() as runner:
        while (asked := pipe.recv()) is not None:
            url, stream = asked
            pipe.send(runner.run(_ask_all(url, stream, bodies)))


async def _ask_all(
    url: str, stream: bool, bodies: Sequence[dict[str, Any]]
) -> tuple[float, list[int]]:
    import httpx

    async with httpx.AsyncClient(timeout=600) as client:
        started = time.perf_counter()
        counts = await asyncio.gather(*(_ask(client, url, body, stream) for body in bodies))
        return time.perf_counter() - started, list(counts)


async def _ask(client: Any, url: str, body: dict[str, Any], stream: bool) -> int:
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
