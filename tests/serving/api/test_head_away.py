"""Ray's head hangs: who asks for the figures of all replicas is told so, and the rest goes on."""

import asyncio
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import httpx
import pytest

from rayfin.adapters import Registry
from rayfin.config.serving import ServeConfig
from rayfin.serving.api import service
from rayfin.serving.api.app import create_app
from rayfin.serving.model_names import ModelNames


class Hanging:
    """An aggregator whose calls to the head don't return while it hangs."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.asked = 0

    def labels(self, wanted: Iterable[str], most: int) -> set[str]:
        return set(wanted)

    def total(self) -> Mapping[str, float]:
        self.asked += 1
        assert self.answers.wait(540)
        return {}

    def engine_total(self) -> Mapping[str, float]:
        return {"finished": 7}

    def close(self) -> None:
        pass


def test_figures_that_cannot_be_collected_are_refused_in_time(
    engine: Any, shared_registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_COLLECT_SECONDS", 0.2)
    pool = Hanging()
    names = ModelNames(shared_registry, "tiny")
    app = create_app(engine, names, ServeConfig(), aggregator=lambda _: pool)

    async def scrape() -> None:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            refused = await asyncio.gather(*(client.get("/metrics") for _ in range(3)))
            refused.append(await client.get("/metrics"))
            for answer in refused:
                assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["code"] == "unavailable"
            assert pool.asked == 1, "every scrape left a thread behind"
            assert (await client.get("/health")).status_code == 200
            pool.answers.set()
            while (answer := await client.get("/metrics")).status_code == 503:
                await asyncio.sleep(0.01)
            assert "rayfin_engine_finished_total 7.0" in answer.text

    asyncio.run(asyncio.wait_for(scrape(), 540))
