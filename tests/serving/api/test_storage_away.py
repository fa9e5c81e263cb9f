"""A disk that stalls or is gone: what needs it gets 503, and the rest goes on."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from rayfin.adapters import Registry
from rayfin.adapters.served_catalog import ServedCatalog
from rayfin.errors import AdapterError, StorageError, Unavailable
from rayfin.serving.api import service
from rayfin.serving.engine import engine as engine_module
from rayfin.serving.engine import vllm
from rayfin.serving.engine.adapter_reads import MOST_STUCK, reading
from rayfin.serving.engine.batch import RowSpan
from rayfin.serving.engine.engine import Engine
from rayfin.serving.engine.request import AdapterSource
from rayfin.serving.replica_cleanup import ReplicaCleanup
from rayfin.serving.timed_executor import TimedExecutor

PATIENCE = 540.0
NEVER = 3600.0
"""Seconds of a limit that passes only where a test says so."""


class Disk:
    """What lies between an engine and its adapters; reads of those in `stalled` wait.

    Of those in `broken` they fail, as of a disk that has errors.
    """

    def __init__(self, read: Callable[..., Any]) -> None:
        self.stalled: set[str] = set()
        self.broken: set[str] = set()
        self.reads: list[str] = []
        self._read = read
        self._changed = threading.Condition()

    def read(self, source: AdapterSource, *more: Any) -> Any:
        with self._changed:
            self.reads.append(source.ref)
            self._changed.notify_all()
            self._changed.wait_for(lambda: source.ref not in self.stalled)
        if source.ref in self.broken:
            raise OSError(errno.EIO, "Input/output error")
        return self._read(source, *more)

    def wait_for(self, true: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(true, PATIENCE)

    def recover(self) -> None:
        with self._changed:
            self.stalled.clear()
            self._changed.notify_all()


def time_is_over(calls: TimedExecutor, *names: str) -> None:
    """Of the calls that are about `names`."""
    with calls._changed:
        for call in {*calls._awaited, *calls._running}:
            if any(f"'{name}" in call.what for name in names):
                call.asked -= 2 * NEVER
                call.began -= 2 * NEVER
        calls._changed.notify_all()


def reads(engine: Any) -> TimedExecutor:
    """Of an engine of either type."""
    calls: TimedExecutor = (engine._host if isinstance(engine, Engine) else engine._adapters)._calls
    return calls


@pytest.fixture
def kind() -> str:
    """The engine's type."""
    return "transformers"


BOTH = pytest.mark.parametrize("kind", ["transformers", "vllm"])


@pytest.fixture
def disk(kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    place: tuple[Any, str] = (vllm, "check_lora")
    if kind == "transformers":
        place = (engine_module, "read_adapter")
    disk = Disk(getattr(*place))
    monkeypatch.setattr(*place, disk.read)
    yield disk
    disk.recover()  # or its threads would wait for ever


@pytest.fixture
def registry(tiny_adapters: dict[str, AdapterSource], tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "adapters")
    for name in ("red", "green", "blue"):
        registry.publish(name, tiny_adapters["lora"].path)
    registry.publish("other", tiny_adapters["rslora"].path)
    return registry


@pytest.fixture
def server(tools: Any, engines: Any, tiny: str, registry: Registry, kind: str) -> Iterator[Any]:
    engine = engines(tiny, type=kind, max_rows=4, max_length=512, load_seconds=NEVER)
    catalog: Any = ServedCatalog(registry.root)
    with tools.serving(engine, catalog, tools.ApiConfig()) as server:
        yield server


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def refused(response: httpx.Response, words: str) -> None:
    """Whether it is the error that clients take for a reason to try again."""
    assert response.status_code == 503, response.text
    assert int(response.headers["retry-after"]) >= 1
    error = response.json()["error"]
    assert words in error["message"] and error["code"] == "unavailable"


@BOTH
def test_reads_that_stall_are_given_up_and_others_go_on(server: Any, disk: Disk) -> None:
    disk.stalled |= {"red@1", "green@1"}  # as many as there are threads that read
    with ThreadPoolExecutor(2) as pool:
        stuck = [pool.submit(server.complete, model=name) for name in ("red", "green")]
        disk.wait_for(lambda: len(disk.reads) == 2)
        time_is_over(reads(server.engine), "red", "green")
        assert text(server.complete(model="other")) != text(server.complete())
        for name, asked in zip(("red", "green"), stuck, strict=True):
            refused(asked.result(), f"'{name}@1' is being read, and that did not end in")
    # No second thread is left to an adapter that one is stuck with.
    refused(server.complete(model="red"), "has not ended")
    assert sorted(disk.reads) == ["green@1", "other@1", "red@1"]
    assert server.engine.health_problem is None and server.http.get("/health").status_code == 200

    disk.recover()
    wait_until(lambda: not reads(server.engine).stuck)
    assert text(server.complete(model="red")) == text(server.complete(model="green"))


def test_what_the_host_cache_holds_waits_for_no_read_of_another(
    tools: Any, engines: Any, tiny: str, registry: Registry, disk: Disk
) -> None:
    engine = engines(tiny, max_rows=4, slots=1, max_length=512, load_seconds=NEVER)
    with (
        tools.serving(engine, registry, tools.ApiConfig()) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        expected = text(server.complete(model="other"))
        assert text(server.complete(model="blue")) != expected
        assert set(engine.resident()) == {"blue@1"}, "the other is in the cache only"
        disk.stalled |= {"red@1", "green@1"}
        stuck = [pool.submit(server.complete, model=name) for name in ("red", "green")]
        disk.wait_for(lambda: disk.stalled <= set(disk.reads))
        try:
            assert text(server.complete(model="other")) == expected
        finally:
            disk.recover()
        assert text(stuck[0].result()) == text(stuck[1].result())


@BOTH
def test_a_read_that_fails_by_the_disk_is_the_requests_alone_and_tried_again(
    server: Any, disk: Disk
) -> None:
    disk.broken |= {"red@1"}
    refused(server.complete(model="red"), "can't be read now (Input/output error)")
    assert text(server.complete(model="green")) != text(server.complete())
    disk.broken.clear()
    assert text(server.complete(model="red")) == text(server.complete(model="green"))


def test_a_disk_with_errors_is_not_taken_for_a_damaged_adapter() -> None:
    """Readers of small files say what they know: that it can't be read."""

    def read(number: int, said: str) -> None:
        with reading("red@1"):
            try:
                raise OSError(number, said)
            except OSError as error:
                raise AdapterError(f"it can't be read ({said}); check its permissions") from error

    with pytest.raises(Unavailable, match=r"'red@1' can't be read now \(Input/output error\)"):
        read(errno.EIO, "Input/output error")
    with pytest.raises(Unavailable, match=r"can't be read now \(Too many open files\)"):
        read(errno.EMFILE, "Too many open files")
    with pytest.raises(Unavailable, match="no memory is left"), reading("red@1"):
        raise MemoryError
    with pytest.raises(AdapterError, match="check its permissions"):
        read(errno.EACCES, "Permission denied")


@BOTH
def test_an_engine_with_too_many_stuck_reads_is_to_be_replaced(
    engines: Any, tiny: str, disk: Disk, tmp_path: Path, kind: str
) -> None:
    engine = engines(tiny, type=kind, max_rows=4, max_length=512, load_seconds=NEVER)
    sources = [AdapterSource(f"a{n}@1", tmp_path) for n in range(MOST_STUCK)]
    disk.stalled |= {source.ref for source in sources}
    with ThreadPoolExecutor(2) as pool:
        for one, other in zip(sources[::2], sources[1::2], strict=True):
            asked = [pool.submit(engine.check, source) for source in (one, other)]
            disk.wait_for(lambda: {one.ref, other.ref} <= set(disk.reads))  # noqa: B023
            assert engine.health_problem is None
            time_is_over(reads(engine), one.ref, other.ref)
            assert all("did not end" in str(each.exception()) for each in asked)
    ailing = r"16 reads of the storage hang, the first for \d+ s \(.*'a0@1'.*\), in .* \("
    assert re.match(ailing, engine.health_problem or "")
    with pytest.raises(Unavailable, match=r"^adapter 'next@1' .* 16 other reads .* try again$"):
        engine.check(AdapterSource("next@1", tmp_path))
    disk.recover()
    wait_until(lambda: engine.health_problem is None)


def test_a_step_that_does_not_end_is_a_reason_to_replace_the_engine(
    engines: Any, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines(tiny, max_rows=4, max_length=512, step_seconds=0.2)
    entered, leave = threading.Event(), threading.Event()
    step = engine._scheduler.step

    def stuck() -> bool:
        entered.set()
        leave.wait(PATIENCE)
        return bool(step())

    monkeypatch.setattr(engine._scheduler, "step", stuck)
    assert entered.wait(PATIENCE)
    wait_until(lambda: engine.health_problem is not None)
    assert re.match(
        r"a step of the engine has taken .* in wait \(.*_work \(", engine.health_problem
    )
    leave.set()
    monkeypatch.undo()
    wait_until(lambda: engine.health_problem is None)


def test_a_client_that_leaves_during_a_cold_load_leaves_nothing_behind(
    server: Any, disk: Disk
) -> None:
    disk.stalled.add("red@1")
    body = json.dumps({"model": "red", "prompt": "hello", "max_tokens": 2}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head.encode() + body)
        disk.wait_for(lambda: disk.reads == ["red@1"])
    wait_until(lambda: server.engine.stats().waiting == 0)
    assert disk.reads == ["red@1"] and server.engine.stats().host_loads == 0
    disk.recover()
    wait_until(lambda: server.engine.stats().host_loads == 1)
    assert server.engine.stats().running == 0 and server.engine.resident() == {}
    text(server.complete(model="red"))  # what was read meanwhile serves the next
    assert disk.reads == ["red@1"] and list(server.engine.resident()) == ["red@1"]
    assert not any(slot.pins for slot in server.engine._scheduler.slots._held.values())


def test_what_leaves_the_host_cache_goes_on_generating(
    server: Any, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = text(server.complete(model="red", max_tokens=40, ignore_eos=True))
    host, scheduler = server.engine._host, server.engine._scheduler
    schedule, go_on = scheduler._schedule, threading.Event()

    def without_red() -> list[RowSpan]:
        """A row that has more than begun waits, as if it had a thousand tokens to go."""
        return [p for p in schedule() if go_on.is_set() or p.start < 20]

    monkeypatch.setattr(scheduler, "_schedule", without_red)
    host._limit = max(adapter.nbytes for adapter in host._held.values())  # room for one
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.complete, model="red", max_tokens=40, ignore_eos=True)
        wait_until(lambda: any(s.computed >= 20 for s in scheduler.running))
        for name in ("green", "blue"):
            text(server.complete(model=name))
        assert not asked.done() and "red@1" not in host._held, "it was not evicted meanwhile"
        go_on.set()
        assert text(asked.result()) == alone
    assert host.bytes == sum(adapter.nbytes for adapter in host._held.values()) <= host._limit


def test_a_registry_that_is_gone_is_no_empty_one(
    server: Any, registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = text(server.complete(model="red"))
    loads = server.engine.stats().host_loads
    for lost in (lambda: None, registry.root.mkdir):  # and the mount point without a disk
        registry.root.rename(tmp_path / "elsewhere")
        lost()
        wait_until(lambda: server.complete(model="red").status_code == 503)
        for model in ("red", "red@1", "never"):
            refused(server.complete(model=model), "no adapter can be looked up; 'tiny' itself")
        assert str(tmp_path) not in server.complete(model="red").text
        assert server.http.get("/health").status_code == 503
        assert server.http.get("/v1/models").status_code == 503
        text(server.complete())  # the base needs no registry
        assert list(server.engine.resident()) == ["red@1"]
        shutil.rmtree(registry.root, ignore_errors=True)
        (tmp_path / "elsewhere").rename(registry.root)
        wait_until(lambda: server.http.get("/health").status_code == 200)
        assert text(server.complete(model="red")) == said
        assert server.complete(model="never").status_code == 404
    assert server.engine.stats().host_loads == loads, "what was loaded had gone"
    # Once each time, however many requests there were, with what whoever mends it needs.
    told = [
        one.getMessage() for one in caplog.records if one.name == "rayfin.serving.public_messages"
    ]
    first, back, second, again = told
    assert f"registry '{registry.root}' is not there (No such file or directory)" in first
    assert f"registry '{registry.root}' has no .lock" in second
    assert back == again == "the registry of adapters is back"


def test_what_the_system_says_of_a_registry_is_in_the_log(
    tools: Any,
    engine: Any,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    catalog: Any = ServedCatalog(registry.root)
    stat = Path.stat

    def stale(path: Path, **options: Any) -> Any:
        if path == registry.root:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return stat(path, **options)

    with tools.serving(engine, catalog, tools.ApiConfig()) as server:
        monkeypatch.setattr(Path, "stat", stale)
        for _ in range(3):
            refused(server.http.get("/health"), "can't be reached now")
        monkeypatch.undo()
        assert server.http.get("/health").status_code == 200
    away, _ = [
        one.getMessage() for one in caplog.records if one.name == "rayfin.serving.public_messages"
    ]
    assert f"can't be used (Stale file handle, {registry.root})" in away
    assert f"OSError: [Errno {errno.ESTALE}] Stale file handle: '{registry.root}'" in away


def test_a_mount_point_without_its_disk_is_no_empty_registry(tmp_path: Path) -> None:
    """As a replica finds it that starts meanwhile, and has seen nothing before."""
    point = tmp_path / "adapters"
    point.mkdir()
    (point / "lost+found").mkdir()
    catalog = ServedCatalog(point)
    for look in (catalog.check, catalog.names, lambda: catalog.versions("red")):
        with pytest.raises(StorageError, match=r"not there; mount its disk.*rayfin adapters"):
            look()
    catalog.make()  # as `rayfin serve` does, on a new storage
    assert catalog.names() == ()


def test_a_registry_that_was_copied_without_its_lock_is_protected(
    registry: Registry, tmp_path: Path
) -> None:
    (registry.root / ".lock").unlink()
    catalog, engine = ServedCatalog(registry.root), Forgetful()
    cleanup: Any = ReplicaCleanup(engine, catalog)  # type: ignore[arg-type]
    try:
        cleanup.know(AdapterSource("red@1", registry.root / "red" / "1"))
        assert catalog.versions("red") == (1,)
        registry.root.rename(tmp_path / "elsewhere")
        registry.root.mkdir()
        for _ in range(2):  # the first may have begun before
            cleanup.check()
            cleanup._reading.result(PATIENCE)
        assert engine.forgotten == [], "an empty mount point took loaded adapters along"
        registry.root.rmdir()
        (tmp_path / "elsewhere").rename(registry.root)
        with pytest.raises(StorageError, match=r"has no \.lock"):
            catalog.check()
        registry.promote("red", 1)
        catalog.check()
        registry.unalias("red", "prod")
        registry.remove("red@1")
        wait_until(lambda: engine.forgotten)
        assert engine.forgotten == ["red@1"]
    finally:
        cleanup.close()


class Forgetful:
    """The one call of an engine that the follower makes here."""

    def __init__(self) -> None:
        self.forgotten: list[str] = []

    def forget(self, ref: str) -> None:
        self.forgotten.append(ref)


def test_looks_at_a_registry_that_stalls_are_given_up(
    tools: Any, engines: Any, tiny: str, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, leave = threading.Event(), threading.Event()
    versions, pools = ServedCatalog.versions, {}

    def stalls(self: ServedCatalog, name: str) -> tuple[int, ...]:
        if name == "red":
            entered.set()
            leave.wait(PATIENCE)
        return versions(self, name)

    def made(name: str, **settings: Any) -> TimedExecutor:
        pools[name] = TimedExecutor(name, **settings)
        return pools[name]

    monkeypatch.setattr(ServedCatalog, "versions", stalls)
    monkeypatch.setattr(service, "TimedExecutor", made)
    monkeypatch.setattr(service, "_READ_SECONDS", NEVER)
    engine = engines(tiny, max_rows=4, max_length=512)
    catalog: Any = ServedCatalog(registry.root)
    with (
        tools.serving(engine, catalog, tools.ApiConfig()) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        asked = pool.submit(server.complete, model="red")
        assert entered.wait(PATIENCE)
        time_is_over(pools["registry"], "red")
        refused(asked.result(), "did not end")
        text(server.complete(model="other"))
        leave.set()


def wait_until(true: Callable[[], Any]) -> None:
    give_up = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < give_up, "it did not come about"
        time.sleep(0.02)
