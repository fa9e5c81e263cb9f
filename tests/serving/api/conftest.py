"""Real servers on this machine: the app, an engine on the tiny model, and published adapters."""

from __future__ import annotations

import json
import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from rayfin.adapters import Registry
from rayfin.config.schema import ModelConfig
from rayfin.config.serving import ApiConfig, EngineConfig, ReplicaConfig, ServeConfig
from rayfin.serving.api.app import create_app
from rayfin.serving.api.history_metrics import HistoryMetrics
from rayfin.serving.compatibility import served_names
from rayfin.serving.engine.engine import Engine
from rayfin.serving.engine.request import AdapterSource

BASE = "tiny"
PATIENCE = 540.0


@dataclass
class Server:
    """An app behind uvicorn on a free port."""

    port: int
    engine: Engine
    registry: Registry
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(
            api_key=key, base_url=f"{self.url}/v1", max_retries=0, timeout=PATIENCE
        )

    def complete(self, **body: Any) -> httpx.Response:
        body = {"model": BASE, "prompt": "hello", "max_tokens": 2, "temperature": 0, **body}
        return self.http.post("/v1/completions", json=body)

    def curl(self, arguments: list[str]) -> str:
        """What `curl` would print, given its arguments as the guide has them; JSON with spaces."""
        url, *options = arguments
        given = dict(zip(options[::2], options[1::2], strict=True))
        assert given.keys() <= {"-H", "-d"}, given
        name, _, value = given.get("-H", "").partition(": ")
        headers = {name: value} if name else {}
        path = url.removeprefix("localhost:8000")
        response = self.http.post(path, content=given["-d"], headers=headers)
        return json.dumps(response.json(), ensure_ascii=False)

    def chat(self, model: str = BASE, **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "hello"}]
        body = {"model": model, "messages": messages, "max_tokens": 2, "temperature": 0, **body}
        return self.http.post("/v1/chat/completions", json=body)


@contextmanager
def serving(
    engine: Engine, registry: Registry, config: ApiConfig, figures: HistoryMetrics | None = None
) -> Iterator[Server]:
    deployment = ServeConfig(
        model=ModelConfig(name=engine.model_name),
        engine=engine.config,
        api=config,
        deployment=ReplicaConfig(served_model_name=BASE),
    )
    app = create_app(engine, served_names(deployment, registry), deployment, figures)
    settings = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="error", ws="none", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive(), "the server starts")
    try:
        served = Server(server.servers[0].sockets[0].getsockname()[1], engine, registry)
        with served.http:
            yield served
    finally:
        server.should_exit = True
        thread.join(PATIENCE)


def wait_until(happened: Callable[[], bool], what: str) -> None:
    """Returns as soon as `happened`; fails the test when it doesn't."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.005)


def guide(section: str) -> list[tuple[str, list[str], str]]:
    """The commands of a section of docs/serving.md: program, arguments, and what is shown."""
    text = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    steps = []
    for block in re.findall(r"```console\n(.*?)```", found, re.DOTALL):
        for step in block.split("$ ")[1:]:
            command, shown = step.split("\n", 1)
            program, *arguments = shlex.split(os.path.expandvars(command))
            steps.append((program, arguments, shown))
    assert steps
    return steps


def assert_shown(out: str, shown: str) -> None:
    """… stands for what differs, or for more."""
    pattern = re.escape(shown.strip()).replace("…", r"(?:.|\n)*")
    pattern = re.sub(r"(?:\\ )+", r"\\s+", pattern)
    assert re.fullmatch(pattern, out.strip()), (pattern, out)


class Tools:
    """What the tests of this folder share (pytest's importlib mode imports no conftest)."""

    BASE = BASE
    Server = Server
    ApiConfig = ApiConfig
    serving = staticmethod(serving)
    wait_until = staticmethod(wait_until)
    guide = staticmethod(guide)
    assert_shown = staticmethod(assert_shown)


@pytest.fixture(scope="session")
def tools() -> Tools:
    return Tools()


@pytest.fixture(scope="session")
def engine(tiny: str) -> Iterator[Engine]:
    settings = EngineConfig(max_rows=8, max_length=512)
    engine = Engine(ModelConfig(name=tiny), settings, use_gpu=False)
    engine.start()
    yield engine
    engine.close()


def publish_all(registry: Registry, adapters: dict[str, AdapterSource]) -> None:
    """support@1 (prod, LoRA), support@2 (rsLoRA), sales@1 (P-Tuning)."""
    registry.publish("support", adapters["lora"].path, alias="prod")
    registry.publish("support", adapters["rslora"].path)
    registry.publish("sales", adapters["p_tuning"].path)


@pytest.fixture(scope="session")
def shared_registry(
    tiny_adapters: dict[str, AdapterSource], tmp_path_factory: pytest.TempPathFactory
) -> Registry:
    """Not to be changed by a test."""
    registry = Registry(tmp_path_factory.mktemp("registry"))
    publish_all(registry, tiny_adapters)
    return registry


@pytest.fixture(scope="session")
def server(engine: Engine, shared_registry: Registry) -> Iterator[Server]:
    """Open to all, as an ApiConfig without settings makes it."""
    with serving(engine, shared_registry, ApiConfig()) as server:
        yield server


@pytest.fixture
def registry(tiny_adapters: dict[str, AdapterSource], tmp_path: Path) -> Registry:
    """One of the test's own."""
    registry = Registry(tmp_path / "registry")
    publish_all(registry, tiny_adapters)
    return registry
