"""`rayfin serve` with two engine replicas: real Ray Serve, spoken to over HTTP alone.

How fast it is after an overload is measured by experiments/benchmarks/serving_overload.py.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from rayfin.adapters import Registry
from rayfin.history import History, TrialRecord, now
from rayfin.paths import Storage
from rayfin.serving.engine.request import AdapterSource

ROOT = Path(__file__).parents[2]
SEEN_WITHIN = 5.0
"""Seconds in which all replicas follow the registry."""
WHOLE_WITHIN = 60.0
"""Seconds in which a killed replica is replaced."""
PROMPT = "Hello"
ROWS, QUEUE = 4, 4
LONG = 4000
"""Tokens that take longer than any test waits."""

CLIENTS = 10 * 2 * (ROWS + QUEUE)
"""Ten times what two replicas take."""
OVERLOADED = 8.0
SETTLED = 3.0
"""Seconds of that, and after how many memory should not grow any more, but for ..."""
SLACK = 64 * 2**20
LEAVING = 200

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def says(
    lab: Any, tiny: str, tiny_adapters: dict[str, AdapterSource], tiny_tokenizer: Any
) -> Callable[[str | None, int], str]:
    """What plain PEFT says with an adapter of some method, or the base model."""

    def say(method: str | None, tokens: int = 8) -> str:
        source = None if method is None else tiny_adapters[method]
        prompt = tiny_tokenizer(PROMPT)["input_ids"]
        ids = lab.peft_answers(tiny, source, [prompt], tokens)[0]
        return str(tiny_tokenizer.decode(ids, skip_special_tokens=True))

    return say


@pytest.fixture(scope="module")
def service(
    lab: Any,
    tiny: str,
    tiny_adapters: dict[str, AdapterSource],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    storage = tmp_path_factory.mktemp("served")
    registry = Registry(storage / "adapters")
    with History.open(Storage.at(storage).history_url) as history:
        history.put(trial("made-red"))
    registry.publish("red", tiny_adapters["lora"].path, {"trial_id": "made-red"}, alias="prod")
    registry.publish("blue", tiny_adapters["ia3"].path)
    service = lab.Service(tiny, storage, max_rows=ROWS, max_queue=QUEUE, max_length=4096)
    yield service
    service.close()


def trial(trial_id: str) -> TrialRecord:
    times = {"created_at": now(), "updated_at": now()}
    facts = {"sweep_id": "s", "fingerprint": "f", "metrics": {"eval_loss": 1.0}, **times}
    return TrialRecord.parse({"trial_id": trial_id, "status": "finished", **facts})


Says = Callable[..., str]


def test_it_says_what_it_serves(service: Any) -> None:
    assert {one["ref"] for one in service.told["adapters"]} == {"red@1", "blue@1"}
    assert service.told["base"] == service.model
    assert f"{service.told['url']}/v1/chat/completions" in service.told["curl"]


def test_it_leaves_no_port_but_the_replicas_own_to_other_machines(lab: Any, service: Any) -> None:
    """Serve binds a replica's own server to all addresses, and asks for the token there."""
    family = psutil.Process(service.process.pid).children(recursive=True)
    listening = [
        (process, one.laddr.ip.removeprefix("::ffff:"))
        for process in family
        for one in process.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN
    ]
    opened = [process for process, address in listening if address not in ("127.0.0.1", "::1")]
    assert len(listening) - len(opened) >= 5, "Ray's own ports were not seen"
    assert max(Counter(process.pid for process in opened).values(), default=0) <= 1
    titles = {lab.title(process).strip() for process in opened}
    assert titles <= {"ray::ServeReplica:rayfin:engine", "ray::ServeReplica:rayfin:api"}, titles


def test_adapters_answer_by_name(service: Any, says: Says) -> None:
    assert service.answer("red") == ("red@1", says("lora"))
    assert service.answer("blue@1") == ("blue@1", says("ia3"))
    assert service.answer(service.model) == (service.model, says(None))
    assert service.ask("green").status_code == 404


def test_a_new_version_is_served_by_all_replicas_within_seconds(
    service: Any, tiny_adapters: dict[str, AdapterSource], says: Says
) -> None:
    before = service.count("slot_fills")
    service.registry.publish("red", tiny_adapters["p_tuning"].path)
    service.until(lambda: service.answer("red")[0] == "red@2", SEEN_WITHIN)

    def on_both() -> bool:
        for response in service.at_once(2 * ROWS, "red"):
            assert response.status_code == 200, response.text
            value = response.json()
            answered = (value["model"], value["choices"][0]["text"])
            assert answered == ("red@2", says("p_tuning"))
        return service.count("slot_fills") >= before + 2

    service.until(on_both)


def test_an_alias_switches_within_seconds(service: Any, says: Says) -> None:
    assert service.answer("red@prod") == ("red@1", says("lora"))
    service.registry.promote("red", 2)
    service.until(lambda: service.answer("red@prod") == ("red@2", says("p_tuning")), SEEN_WITHIN)
    service.registry.rollback("red")
    service.until(lambda: service.answer("red@prod") == ("red@1", says("lora")), SEEN_WITHIN)


def test_a_removed_version_is_gone_within_seconds(service: Any) -> None:
    service.registry.remove("blue@1")
    service.until(lambda: service.ask("blue").status_code == 404, SEEN_WITHIN)


def test_a_client_that_leaves_frees_its_row(service: Any) -> None:
    # As many as one replica has rows: however they spread over the replicas, none has to wait.
    before = service.count("generated_tokens")
    streams = [service.stream("red@1", LONG) for _ in range(ROWS)]
    service.until(lambda: service.count("running") == ROWS)
    for stream in streams:
        stream.close()
    service.until(lambda: service.count("running") == 0)
    assert service.count("generated_tokens") < before + ROWS * LONG
    # The rows are there for others again, all of them.
    answers = service.at_once(2 * ROWS, "red@1")
    assert [answer.status_code for answer in answers] == [200] * (2 * ROWS)


def test_too_much_is_refused_and_then_all_is_well(service: Any, says: Says) -> None:
    responses = service.at_once(10 * (ROWS + QUEUE), "red@1", tokens=100)
    refused = [response for response in responses if response.status_code == 429]
    answered = [response for response in responses if response.status_code == 200]
    assert len(refused) + len(answered) == len(responses)
    assert refused and all(int(response.headers["retry-after"]) > 0 for response in refused)
    texts = {response.json()["choices"][0]["text"] for response in answered}
    assert texts == {says("lora", 100)}
    assert service.answer("red@1") == ("red@1", says("lora"))


def body(tokens: int, **more: Any) -> dict[str, Any]:
    asked = {"model": "red", "prompt": "Hello", "max_tokens": tokens, "temperature": 0}
    return asked | {"ignore_eos": True} | more


def async_client(service: Any) -> httpx.AsyncClient:
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
        until = time.monotonic() + OVERLOADED
        async with async_client(service) as http:
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
            await asyncio.sleep(0.5)

    async def all_leave() -> None:
        async with async_client(service) as http:
            await asyncio.gather(*(leave(http) for _ in range(LEAVING)))

    asyncio.run(all_leave())
    assert len(begun) == LEAVING
    service.until(lambda: service.count("running") == service.count("waiting") == 0)
    assert service.count("generated_tokens") - before < LEAVING * LONG / 2
    # As many as there are rows and places in the queues of one replica: none may be taken.
    answers = service.at_once(ROWS + QUEUE, "red")
    assert [answer.status_code for answer in answers] == [200] * (ROWS + QUEUE)


def test_a_killed_replica_takes_only_its_own_requests_along(service: Any, says: Says) -> None:
    expected = {"red@1": says("lora", 32), "red@2": says("p_tuning", 32)}
    killed, stop = threading.Event(), threading.Event()
    failed: list[httpx.Response] = []

    def client(model: str) -> None:
        while not stop.is_set():
            response = service.ask(model, tokens=32)
            if response.status_code == 200:
                value = response.json()
                assert value["model"] == model
                assert value["choices"][0]["text"] == expected[model]
            elif response.status_code != 429:  # one replica has less room than two
                assert killed.is_set(), response.text
                failed.append(response)

    first, other = service.until(lambda: len(e := service.replicas("engine")) == 2 and e)
    with ThreadPoolExecutor(ROWS) as pool:
        clients = [pool.submit(client, f"red@{1 + i % 2}") for i in range(ROWS)]
        try:
            service.until(lambda: service.count("running") > 0)
            killed.set()
            first.kill()
            service.until(lambda: service.count("replicas") == 1, WHOLE_WITHIN)
            service.until(lambda: service.count("replicas") == 2, WHOLE_WITHIN)
        finally:
            stop.set()
        for done in clients:
            done.result()
    assert len(failed) <= ROWS
    assert all(response.status_code >= 500 for response in failed)
    assert other.is_running() and len(service.replicas("engine")) == 2


def test_a_killed_api_leaves_no_row_occupied(service: Any, says: Says) -> None:
    before = service.count("generated_tokens")
    streams = [service.stream("red@1", LONG) for _ in range(ROWS)]
    service.until(lambda: service.count("running") == ROWS)
    (api,) = service.replicas("api")
    api.kill()
    for stream in streams:
        stream.close()

    def answers_again() -> bool:
        return service.ask("red@1").status_code == 200

    service.until(answers_again, WHOLE_WITHIN)
    assert service.answer("red@1") == ("red@1", says("lora"))
    service.until(lambda: service.count("running") == 0)
    assert service.count("generated_tokens") < before + ROWS * LONG


def test_requests_at_work_end_before_it_stops(service: Any, says: Says) -> None:
    events = service.stream("red@1", 600, temperature=0).iter_lines()
    first = next(events)  # it is at work, and goes on while the rest is read
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(list, events)
        assert service.stop(signal.SIGTERM) == 0, service.errors()
    said = [line.removeprefix("data: ") for line in [first, *rest.result()] if line]
    assert said.pop() == "[DONE]"
    chunks = [json.loads(text) for text in said]
    assert {chunk["model"] for chunk in chunks} == {"red@1"}
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])
    assert text == says("lora", 600)
    assert "Traceback" not in service.errors()


def test_what_it_measured_is_in_the_history(service: Any) -> None:
    assert service.process.poll() is not None, "the test before this one stops it"
    with History.open(Storage.at(service.registry.root.parent).history_url) as history:
        metrics = history.get("made-red").metrics
    assert metrics["serving_requests"] > 0 and metrics["serving_adapter_bytes"] > 0
    assert metrics["serving_time_to_first_token_seconds"] > 0
    assert metrics["serving_tokens_per_second"] > 0 and metrics["eval_loss"] == 1.0


@pytest.mark.parametrize("name", ["local.yaml", "gpu.yaml"])
def test_serve_config_files_are_valid(name: str) -> None:
    code = f"""
import yaml
from ray.serve.schema import ServeDeploySchema
from rayfin.config import load_serve_config
schema = ServeDeploySchema.model_validate(yaml.safe_load(open({str(ROOT / "serve" / name)!r})))
for application in schema.applications:
    load_serve_config(application.args)
    print(application.import_path)
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["serve.app:app"]


def test_a_cluster_that_is_gone_ends_the_command(lab: Any, tiny: str, tmp_path: Path) -> None:
    service = lab.Service(tiny, tmp_path, max_rows=ROWS, max_length=64)
    try:
        assert service.answer(tiny)[0] == tiny
        family = psutil.Process(service.process.pid).children(recursive=True)
        engines = service.replicas("engine")
        (head,) = [process for process in family if "gcs_server" in lab.title(process)]
        head.kill()
        assert service.process.wait(WHOLE_WITHIN) == 1
        assert "the Ray cluster at" in service.errors() and "is gone" in service.errors()
        assert "Traceback" not in service.errors()
        assert engines and not psutil.wait_procs(engines, WHOLE_WITHIN)[1]
    finally:
        service.close()
