"""An engine replica as Serve calls it, here without Serve."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayfin.adapters import Registry
from rayfin.config import load_serve_config
from rayfin.errors import Overloaded, RequestError
from rayfin.serving import replica_cleanup
from rayfin.serving.engine.request import (
    AdapterSource,
    Chunk,
    Request,
    SamplingParams,
    check_prompt,
)
from rayfin.serving.engine_replica import ChunkQueue, EngineReplica, merge_chunks
from rayfin.serving.routing import RESIDENT, STATS


def until(true: Callable[[], Any], seconds: float = 540.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (answer := true()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)
    return answer


@pytest.fixture
def replica(tiny: str, tmp_path: Path) -> Iterator[EngineReplica]:
    settings = ["engine.max_rows=1", "engine.max_queue=1", f"storage={tmp_path}"]
    replica = EngineReplica(load_serve_config({"model": {"name": tiny}}, settings), use_gpu=False)
    yield replica
    replica.close()


@pytest.fixture
def published(tiny_adapters: dict[str, AdapterSource], tmp_path: Path) -> AdapterSource:
    version = Registry(tmp_path / "adapters").publish("red", tiny_adapters["lora"].path)
    return AdapterSource(version.ref, version.path)


def asked(name: str, tokens: int, adapter: AdapterSource | None = None) -> Request:
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return Request(name, (72, 101, 108), params, adapter)


async def collect(replica: EngineReplica, request: Request) -> list[Chunk]:
    return [chunk async for chunk in replica.generate(request, None, adapter=None)]


def test_it_sends_the_whole_answer(replica: EngineReplica) -> None:
    chunks = asyncio.run(collect(replica, asked("one", 64)))
    assert sum(len(chunk.token_ids) for chunk in chunks) == 64
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_an_answer_that_is_not_streamed_is_two_messages(replica: EngineReplica) -> None:
    chunks = asyncio.run(collect(replica, replace(asked("one", 200), streamed=False)))
    assert sum(len(chunk.token_ids) for chunk in chunks) == 200
    assert [chunk.finish_reason for chunk in chunks] == [None, "length"]
    assert len(chunks[0].token_ids) < 200, "the first token is not kept waiting"


@pytest.mark.parametrize("streamed", [True, False])
def test_a_call_that_is_closed_frees_its_row(replica: EngineReplica, streamed: bool) -> None:
    async def leave() -> None:
        request = replace(asked("long", 1900), streamed=streamed)
        stream = replica.generate(request, None, adapter=None)
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave())
    until(lambda: replica.record_routing_stats()[STATS]["running"] == 0)
    assert replica.record_routing_stats()[STATS]["generated_tokens"] < 1900


def test_a_call_that_is_cancelled_frees_its_row(replica: EngineReplica) -> None:
    async def leave() -> None:
        request = replace(asked("long", 1900), streamed=False)
        call = asyncio.create_task(collect(replica, request))
        while not replica.record_routing_stats()[STATS]["running"]:
            await asyncio.sleep(0.01)  # it has its first message then, and waits for the last
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(leave())
    until(lambda: replica.record_routing_stats()[STATS]["running"] == 0)
    assert replica.record_routing_stats()[STATS]["generated_tokens"] < 1900


def test_what_the_engine_refuses_says_why(replica: EngineReplica) -> None:
    async def crowd() -> list[list[Chunk]]:
        requests = [asked(str(i), 200) for i in range(8)]
        return await asyncio.gather(*(collect(replica, request) for request in requests))

    refused = [chunks[0] for chunks in asyncio.run(crowd()) if chunks[0].error]
    assert 0 < len(refused) < 8
    travelled = pickle.loads(pickle.dumps(refused[0]))
    assert isinstance(travelled.error, Overloaded) and travelled.error.retry_after > 0
    assert travelled.finish_reason == "error"


def test_a_removed_version_leaves_host_memory(
    replica: EngineReplica, published: AdapterSource, tmp_path: Path
) -> None:
    asyncio.run(collect(replica, asked("red", 4, published)))
    told = replica.record_routing_stats()
    assert list(told[RESIDENT]) == ["red@1"] and told[STATS]["host_bytes"] > 0
    Registry(tmp_path / "adapters").remove("red@1")
    until(lambda: replica.record_routing_stats()[STATS]["host_bytes"] == 0)


def test_it_is_unhealthy_without_its_engine(replica: EngineReplica) -> None:
    replica.check_health()
    replica.close()
    with pytest.raises(RuntimeError, match="engine"):
        replica.check_health()


def test_pieces_join_to_what_they_were() -> None:
    pieces = [Chunk("a", (1,)), Chunk("", ()), Chunk("bc", (2, 3), (), "stop")]
    assert merge_chunks(pieces) == Chunk("abc", (1, 2, 3), (), "stop")


def test_what_has_come_meanwhile_is_taken_together() -> None:
    async def take() -> list[Chunk]:
        outbox = ChunkQueue(asyncio.get_running_loop())
        for token in range(3):
            outbox.put(Chunk("a", (token,)))
        return await outbox.take()

    assert [chunk.token_ids for chunk in asyncio.run(take())] == [(0,), (1,), (2,)]


def test_the_last_piece_does_not_wait() -> None:
    async def last_while_gathering() -> list[Chunk]:
        outbox = ChunkQueue(asyncio.get_running_loop())
        outbox.put(Chunk("a", (1,)))
        await outbox.take()
        waiting = asyncio.create_task(outbox.gather(3600))
        await asyncio.sleep(0)
        await asyncio.to_thread(outbox.put, Chunk("b", (2,), (), "stop"))
        await waiting
        return await outbox.take()

    assert asyncio.run(last_while_gathering()) == [Chunk("b", (2,), (), "stop")]


@pytest.mark.parametrize("prompt", [(), tuple(range(16)), (1, 300), (1, -1)])
def test_prompts_that_no_replica_takes_are_refused_at_once(prompt: tuple[int, ...]) -> None:
    with pytest.raises(RequestError):
        check_prompt(Request("bad", prompt, SamplingParams()), max_length=16, vocabulary=260)


def test_a_registry_that_stalls_keeps_no_dead_callers_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered, leave, cancelled = threading.Event(), threading.Event(), threading.Event()

    def stalls(name: str) -> tuple[int, ...]:
        entered.set()
        leave.wait(540)
        return (1,)

    monkeypatch.setattr(replica_cleanup, "_PERIOD", 0.01)
    monkeypatch.setattr(replica_cleanup, "list_named_actors", lambda **_: [])
    engine: Any = SimpleNamespace(cancel=lambda _: cancelled.set())
    catalog: Any = SimpleNamespace(versions=stalls)
    one = replica_cleanup.ReplicaCleanup(engine, catalog)
    one.know(AdapterSource("red@1", Path("red")))
    assert entered.wait(540)
    one.begun(asked("orphan", 4), "a caller that has died")
    try:
        assert cancelled.wait(540)
        one.close()
        assert not leave.is_set() and not one._thread.is_alive()
    finally:
        leave.set()


def test_what_goes_wrong_in_a_look_at_the_registry_is_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looked = threading.Semaphore(0)

    def fails(name: str) -> tuple[int, ...]:
        looked.release()
        raise RuntimeError("nobody thought of it")

    monkeypatch.setattr(replica_cleanup, "_PERIOD", 0.01)
    one = replica_cleanup.ReplicaCleanup(SimpleNamespace(), SimpleNamespace(versions=fails))  # type: ignore[arg-type]
    one.know(AdapterSource("red@1", Path("red")))
    for _ in range(2):  # the second comes after the first was told
        assert looked.acquire(timeout=540)
    one.close()
    assert "the registry could not be looked at" in caplog.text
    assert "nobody thought of it" in caplog.text
