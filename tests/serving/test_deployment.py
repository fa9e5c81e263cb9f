"""`rayfin serve` with two engine replicas: real Ray Serve, spoken to over HTTP alone.

How fast it is after an overload is measured by experiments/benchmarks/serving_overload.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import peft
import psutil
import pytest
import torch
import yaml

from rayfin.adapters import Registry
from rayfin.config import load_serve_config
from rayfin.config.schema import ModelConfig
from rayfin.history import History, TrialRecord, now
from rayfin.models import load_base
from rayfin.models.quiet import no_progress_bars
from rayfin.paths import Storage
from rayfin.serving.engine.request import AdapterSource

ROOT = Path(__file__).parents[2]
LET_GO_WITHIN = 5.0
"""Seconds in which replicas of a quiet machine let go of a version that was removed."""
PROMPT = "Hello"
ROWS, QUEUE = 4, 4
LONG = 4000
"""Tokens that take longer than any test waits."""

CLIENTS = 10 * 2 * (ROWS + QUEUE)
"""Ten times what two replicas take."""
OVERLOADED = CLIENTS
SETTLED = CLIENTS * 2 // 5
"""Answers after which no client asks again, and after how many of them memory should not grow any
more, but for ..."""
SLACK = 64 * 2**20
LEAVING = 2 * 2 * (ROWS + QUEUE)
"""Twice what two replicas take."""

ADAPTERS, MORE, SLOTS = 12, 4, 4
ASKING, REQUESTS = 2 * 2 * (ROWS + QUEUE), 300
"""Clients at a time, and how many requests they send at least."""
STEPS, LEAD = 200, 0.1
"""At most so many, until every letter is likelier than any other by so much (the tiny model's
scores lie close together)."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"

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
    processes: ModuleType,
) -> Iterator[Any]:
    storage = tmp_path_factory.mktemp("served")
    registry = Registry(storage / "adapters")
    with History.open(Storage.at(storage).history_url) as history:
        history.put(trial("made-red"))
    registry.publish("red", tiny_adapters["lora"].path, {"trial_id": "made-red"}, alias="prod")
    registry.publish("blue", tiny_adapters["ia3"].path)
    limits = {"max_rows": ROWS, "max_queue": QUEUE, "max_length": 4096, "slots": SLOTS}
    service = lab.Service(processes, tiny, storage, **limits)
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
    engines = service.told["engines"]
    assert (engines["device"], engines["cpus"], engines["gpus"]) == ("cpu", 0.5, 0.0)
    assert (engines["replicas"], engines["max_rows"], engines["notes"]) == (2, ROWS, [])


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


def raw(service: Any, data: bytes) -> tuple[int, Any]:
    """What comes of bytes that no client library would send: status and JSON."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=540) as client:
        with contextlib.suppress(OSError):  # it may be refused before all of it is sent
            client.sendall(data)
        answer = b""
        while b"\r\n\r\n" not in answer or not answer.endswith(b"}"):
            answer += (part := client.recv(65536))
            if not part:
                break
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_a_path_is_decoded_once_on_the_way(service: Any) -> None:
    def model(path: bytes) -> tuple[int, Any]:
        return raw(service, b"GET /v1/models/" + path + b" HTTP/1.1\r\nhost: x\r\n\r\n")

    assert model(b"red%401") == (200, model(b"red@1")[1])
    for path in (
        b"red%25401",
        b"%252e%252e%252fadapters%252fred%252f1",
        b"..%2f..%2fred",
        b"%2e%2e/%2e%2e/red",
        b"../../etc/passwd",
        b"%2fetc%2fpasswd",
        b"red%5c..%5cred",
        b"red%00",
        b"red%252f1",
    ):
        status, answer = model(path)
        assert (status, answer["error"]["type"]) == (404, "invalid_request_error"), path
    for name in ("%252e%252e%252fred", "%2e%2e%2fred", "../red", "red%401"):
        assert service.ask(name).status_code == 404


def test_a_head_that_is_too_large_is_refused_in_the_envelope(service: Any) -> None:
    large = b"GET /health HTTP/1.1\r\nhost: x\r\na: " + b"b" * 100_000
    for data in (large + b"\r\n\r\n", large * 4, b"GET /" + b"a" * 300_000, b"no request\r\n\r\n"):
        status, answer = raw(service, data)
        assert status in (400, 431) and answer["error"]["type"] == "invalid_request_error"
    assert service.http.get("/health").status_code == 200


def test_there_is_one_request_id_and_it_is_the_clients(service: Any) -> None:
    for given in ({}, {"x-request-id": "mine-1"}):
        for answer in (
            service.http.get("/health", headers=given),
            service.http.head("/health", headers=given),
            service.http.get("/nowhere", headers=given),
            service.http.post("/v1/completions", content=b"{", headers=given),
        ):
            (name,) = answer.headers.get_list("x-request-id")
            assert not given or name == "mine-1"


def test_a_client_cannot_have_its_request_go_on_without_it(service: Any) -> None:
    before = service.count("generated_tokens")
    service.http.headers["x-request-disconnect-disabled"] = "?1"
    stream = service.stream("red@1", LONG)
    del service.http.headers["x-request-disconnect-disabled"]
    service.until(lambda: service.count("running") == 1)
    stream.close()
    service.until(lambda: service.count("running") == 0)
    assert service.count("generated_tokens") < before + LONG


SLOW = 1100
"""Clients that send a byte of a body; an API replica has fewer places."""


def test_slow_clients_keep_nobody_waiting(service: Any) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{"
    slow = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(SLOW)]
    try:
        for client in slow:
            client.sendall(head)
        statuses: Counter[tuple[str, int]] = Counter()
        for _ in range(20):
            for path in ("/health", "/v1/models"):
                statuses[path, service.http.get(path).status_code] += 1
            statuses["completions", service.ask("red@1").status_code] += 1
            # Ray's head, which has the figures, may take too long on a busy machine.
            if (answer := service.http.get("/metrics")).status_code != 503:
                statuses["/metrics", answer.status_code] += 1
        assert {code for _, code in statuses} == {200} and len(statuses) == 4
        assert all(n == 20 for (path, _), n in statuses.items() if path != "/metrics")
    finally:
        for client in slow:
            client.close()


def test_clients_that_take_nothing_of_their_answers_hold_no_row(service: Any) -> None:
    asked = json.dumps(body(300, stream=True, logprobs=5)).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(asked)
    before = service.count("finished")
    deaf = []
    try:
        for _ in range(ROWS):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", service.port))
            client.sendall(head + asked)
            deaf.append(client)
        service.until(lambda: service.count("finished") >= before + ROWS)
        service.until(lambda: service.count("running") == 0)
    finally:
        for client in deaf:
            client.close()


def test_metrics_are_one_sum_whichever_replica_is_asked(service: Any) -> None:
    name = 'rayfin_requests_total{adapter="red",status="200"}'
    before = service.until(service.counts).get(name, 0)
    for _ in range(20):
        with service.client() as http:  # a connection each, to one of the two API replicas
            assert service.ask("red@1", http=http).status_code == 200
    service.until(lambda: service.counts().get(name) == before + 20)
    # Those of a scrape that Ray's head took too long for are not there.
    scrapes = [counts for _ in range(10) if (counts := service.counts())]
    assert scrapes and {counts[name] for counts in scrapes} == {before + 20}
    for counts in scrapes:
        (asked,) = (k for k in counts if "requests_total" in k and "red" in k and "200" in k)
        assert asked == name, "each figure stands there once"


def test_rays_own_doors_are_shut(service: Any) -> None:
    """The dashboard, with its API that runs jobs, and Ray's client are not there to be asked."""
    ports = service.listening_ports() - {service.port}
    assert len(ports) >= 5, "Ray's own ports were not seen"
    assert not ports & {8265, 10001}
    for port, path in itertools.product(ports, ("/api/jobs/", "/api/job_agent/jobs/")):
        with contextlib.suppress(httpx.TransportError):  # most don't speak HTTP
            url = f"http://127.0.0.1:{port}{path}"
            job = httpx.post(url, json={"entrypoint": "true"}, timeout=2)
            jobs = httpx.get(url, timeout=2)
            assert job.is_error and "submission_id" not in job.text
            assert jobs.is_error or "json" not in jobs.headers["content-type"]
    assert "dashboard/dashboard.py" not in service.family_titles()


def test_a_new_version_is_served_by_all_replicas_within_seconds(
    service: Any, tiny_adapters: dict[str, AdapterSource], says: Says
) -> None:
    before = service.count("slot_fills")
    service.registry.publish("red", tiny_adapters["p_tuning"].path)
    service.until(lambda: service.answer("red")[0] == "red@2")

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
    service.until(lambda: service.answer("red@prod") == ("red@2", says("p_tuning")))
    service.registry.rollback("red")
    service.until(lambda: service.answer("red@prod") == ("red@1", says("lora")))


def test_a_removed_version_is_gone_within_seconds(service: Any) -> None:
    service.registry.remove("blue@1")
    service.until(lambda: service.ask("blue").status_code == 404)


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
    return httpx.AsyncClient(base_url=service.told["url"], timeout=540, limits=limits)


def test_ten_times_too_much_is_refused_in_bounded_memory(service: Any) -> None:
    statuses: Counter[int] = Counter()
    memory: list[int] = []
    processes = [p for name in ("api", "engine") for p in service.replicas(name)]

    async def insist(http: httpx.AsyncClient) -> None:
        while statuses.total() < OVERLOADED:
            response = await http.post("/v1/completions", json=body(32))
            statuses[response.status_code] += 1
            if response.status_code == 429:
                assert int(response.headers["retry-after"]) >= 1
                assert response.json()["error"]["message"]
                await asyncio.sleep(0.05)  # a client that does not do as it is told

    def look() -> None:
        memory.append(sum(process.memory_info().rss for process in processes))

    async def watch() -> None:
        while statuses.total() < SETTLED:
            await asyncio.sleep(0.05)
        while statuses.total() < OVERLOADED:
            look()
            await asyncio.sleep(0.5)

    async def overload() -> None:
        async with async_client(service) as http:
            await asyncio.gather(watch(), *(insist(http) for _ in range(CLIENTS)))

    asyncio.run(overload())
    look()
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
    """Its streams end with an error and right text; whoever asks meanwhile is answered."""
    expected = {"red@1": says("lora", 32), "red@2": says("p_tuning", 32)}
    whole = says("lora", 600)
    killed, stop = threading.Event(), threading.Event()
    asking = threading.Barrier(ROWS + 1, timeout=540)
    failed: list[httpx.Response] = []

    def client(model: str) -> None:
        asking.wait()
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
    streams = [service.stream("red@1", 600, temperature=0) for _ in range(2 * ROWS)]
    events = [stream.iter_lines() for stream in streams]
    opened = [chain([next(lines)], lines) for lines in events]  # each is at work
    with ThreadPoolExecutor(3 * ROWS) as pool, service.monotone():
        clients = [pool.submit(client, f"red@{1 + i % 2}") for i in range(ROWS)]
        try:
            asking.wait()
            killed.set()
            first.kill()
            ends = list(pool.map(heard, opened))
        finally:
            stop.set()
        for done in clients:
            done.result()
        service.whole_without(first)
    assert len(failed) <= ROWS
    assert all(response.status_code >= 500 for response in failed)
    broken = [(text, error) for text, error in ends if error is not None]
    assert 1 <= len(broken) < 2 * ROWS
    for text, error in broken:
        assert whole.startswith(text) and len(text) < len(whole)
        assert "again" in error["message"] and error["type"] == "server_error"
    assert [text for text, error in ends if error is None] == [whole] * (len(ends) - len(broken))
    assert other.is_running() and len(service.replicas("engine")) == 2
    service.until(lambda: f"Ray: process {first.pid} died" in service.errors())


@pytest.mark.long
def test_an_engine_that_hangs_is_replaced_and_its_requests_can_be_sent_again(
    service: Any, says: Says
) -> None:
    text = says("lora", 200)
    hung, other = service.until(lambda: len(e := service.replicas("engine")) == 2 and e)
    answers: list[httpx.Response] = []
    stop = threading.Event()

    def ask(_: int) -> None:
        with service.client() as http:
            while not stop.is_set():
                answers.append(service.ask("red@1", 200, http=http))

    with ThreadPoolExecutor(2 * ROWS) as pool:
        asked = [pool.submit(ask, number) for number in range(2 * ROWS)]
        try:
            service.until(lambda: service.count("running") > 0)
            hung.suspend()  # it answers nothing more, and does not die
            service.until(lambda: not hung.is_running())
        finally:
            stop.set()
        for one in asked:
            one.result()
    for response in answers:
        if response.status_code == 200:
            assert response.json()["choices"][0]["text"] == text
            continue
        assert response.status_code in (429, 503) and int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["message"]
    service.whole_without(hung)
    assert other.is_running() and other in service.replicas("engine")
    assert {service.answer("red@1") for _ in range(2 * ROWS)} == {("red@1", says("lora"))}


@pytest.mark.long
def test_a_proxy_that_is_killed_is_started_again(lab: Any, service: Any, says: Says) -> None:
    family = psutil.Process(service.process.pid).children(recursive=True)
    (proxy,) = [process for process in family if "ProxyActor" in lab.title(process)]
    proxy.kill()

    def answers() -> bool:
        try:
            with service.client() as http:
                return service.ask("red@1", http=http).status_code == 200
        except httpx.TransportError:
            return False

    service.until(answers)
    assert service.answer("red@1") == ("red@1", says("lora"))


def test_a_registry_that_is_gone_takes_nothing_along(service: Any, says: Says) -> None:
    assert {one.status_code for one in service.at_once(2 * ROWS, "red@1", 64)} == {200}  # on both
    elsewhere = service.registry.root.with_name("elsewhere")
    service.registry.root.rename(elsewhere)
    service.until(lambda: service.ask("red@1").status_code == 503)
    service.until(lambda: service.http.get("/health").status_code == 503)
    assert service.answer(service.model) == (service.model, says(None))
    time.sleep(LET_GO_WITHIN)  # in which a removed version would have been let go
    fills = service.count("slot_fills")
    elsewhere.rename(service.registry.root)

    def all_is_well() -> bool:  # each replica of the API looks for itself
        return {one.status_code for one in service.at_once(2 * ROWS, "red@1")} == {200}

    service.until(all_is_well)
    service.until(lambda: service.http.get("/health").status_code == 200)
    assert service.answer("red@1") == ("red@1", says("lora"))
    assert service.count("slot_fills") == fills


def test_a_killed_api_leaves_no_row_occupied(service: Any, says: Says) -> None:
    before = service.count("generated_tokens")
    with service.monotone():
        streams = [service.stream("red@1", LONG, temperature=0) for _ in range(ROWS)]
        events = [stream.iter_lines() for stream in streams]
        service.until(lambda: service.count("running") == ROWS)
        for api in service.replicas("api"):
            api.kill()
        for one in events:  # whoever reads on is told, also by the proxy
            text, error = heard(one)
            assert text and says("lora", 600).startswith(text[:200])
            assert error is not None and error["code"] == "replica_lost"
        for stream in streams:
            stream.close()

        def answers_again() -> bool:
            answer = service.ask("red@1")
            if answer.status_code != 200:
                assert answer.json()["error"]["message"], "the envelope, always"
            return answer.status_code == 200

        service.until(answers_again)
        assert service.answer("red@1") == ("red@1", says("lora"))
        service.until(lambda: service.count("running") == 0)
        service.until(lambda: len(service.replicas("api")) == 2)
    assert service.count("generated_tokens") < before + ROWS * LONG


def heard(lines: Iterator[str]) -> tuple[str, dict[str, Any] | None]:
    """The text of a stream, and the error that it ends with; one without has its [DONE]."""
    said = [line.removeprefix("data: ") for line in lines if line]
    if said[-1] == "[DONE]":
        error = None
        said.pop()
    else:
        error = json.loads(said.pop())["error"]
    chunks = [json.loads(text) for text in said]
    return "".join(c["choices"][0]["text"] for c in chunks if c["choices"]), error


@pytest.mark.long
def test_an_update_under_load_loses_no_request(service: Any, says: Says) -> None:
    """Serve replaces the replicas one after the other; what they work on ends first."""
    expected = says("lora", 32)
    statuses: Counter[int] = Counter()
    stop = threading.Event()

    def client(_: int) -> None:
        with service.client() as http:
            while not stop.is_set():
                answer = service.ask("red@1", tokens=32, http=http)
                statuses[answer.status_code] += 1
                if answer.status_code == 200:
                    assert answer.json()["choices"][0]["text"] == expected
                else:
                    assert answer.status_code in (429, 503), answer.text
                    seconds = int(answer.headers["retry-after"])
                    assert seconds >= 1
                    stop.wait(seconds)  # as a client does that goes by what it is told

    def replicas() -> set[int]:
        return {process.pid for name in ("api", "engine") for process in service.replicas(name)}

    old = replicas()
    with ThreadPoolExecutor(ROWS) as pool, service.monotone():
        clients = pool.map(client, range(ROWS))
        try:
            service.update("engine.prefill_chunk=64")
        finally:
            stop.set()
        list(clients)
    service.until(lambda: len(new := replicas()) == 4 and not new & old)
    assert statuses[200] > 20 * (statuses[429] + statuses[503])


def train_words(
    model: str, tokenizer: Any, prompt: str, words: list[str], folder: Path
) -> dict[str, Path]:
    """Word -> a LoRA adapter that was trained to answer `prompt` with it, of ranks 2 to 8."""
    base: Any = load_base(ModelConfig(name=model), None, "cpu")
    asked = tokenizer(prompt)["input_ids"]
    saved = {}
    for number, word in enumerate(words):
        settings = peft.LoraConfig(
            r=2 + number % 7,
            lora_alpha=16,
            use_rslora=number % 3 == 0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(number)
        with no_progress_bars():
            wrapped = peft.get_peft_model(base, settings)
        said = [*tokenizer(word, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([asked + said])
        labels = torch.tensor([[-100] * len(asked) + said])
        trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=5e-3)
        for _ in range(STEPS):
            answer = wrapped(input_ids=ids, labels=labels)
            likeliest = answer.logits[0, len(asked) - 1 : -1].topk(2)
            lead = (likeliest.values[:, 0] - likeliest.values[:, 1]).min()
            if likeliest.indices[:, 0].tolist() == said and lead > LEAD:
                break
            answer.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            pytest.fail(f"'{word}' was not learned")
        wrapped.eval()
        saved[word] = folder / word
        wrapped.save_pretrained(str(saved[word]), save_embedding_layers=False)
        base = wrapped.unload()
    return saved


class Administrator:
    """Publishes, promotes, rolls back and removes, and knows which word each version says."""

    def __init__(self, registry: Registry, words: dict[str, Path]) -> None:
        self.registry, self._words = registry, words
        self.says: dict[str, str] = {}
        """Version -> its word; written before the version can be seen."""
        self._spare = list(words)
        for number in range(ADAPTERS):
            self._publish(f"a{number:02}", alias="prod")

    def _publish(self, name: str, alias: str | None = None) -> int:
        word = self._spare.pop(0)
        version = max(self.registry.versions(name), default=0) + 1
        self.says[f"{name}@{version}"] = word
        published = self.registry.publish(name, self._words[word], alias=alias)
        assert published.version == version
        return version

    def work(self, stop: threading.Event) -> None:
        """A new version of one adapter after the other: promoted, taken back, the old removed."""
        for number in range(MORE):
            name = f"a{number:02}"
            steps: list[Callable[[], Any]] = [
                lambda: self._publish(name),  # noqa: B023  (called in this round)
                lambda: self.registry.promote(name, 2),  # noqa: B023
                lambda: self.registry.rollback(name),  # noqa: B023
                lambda: self.registry.promote(name, 2),  # noqa: B023
                lambda: self.registry.remove(f"{name}@1"),  # noqa: B023
            ]
            for step in steps:
                if stop.wait(0.2):
                    return
                step()


@pytest.fixture(scope="module")
def administrator(
    lab: Any,
    tiny: str,
    tiny_tokenizer: Any,
    service: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Administrator:
    folder = tmp_path_factory.mktemp("words")
    draw = random.Random(0)
    words = ["".join(draw.sample(LETTERS, 5)) for _ in range(ADAPTERS + MORE)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small only wait for a second one
    try:
        trained = train_words(tiny, tiny_tokenizer, lab.PROMPT, words, folder)
    finally:
        torch.set_num_threads(threads)
    return Administrator(service.registry, trained)


def test_every_answer_belongs_to_the_version_that_it_names(
    service: Any, administrator: Administrator
) -> None:
    """Never the wrong adapter: each says its own word, and many clients hold it to that."""
    evicted = service.count("slot_evictions")
    left = iter(range(10**9))
    taking = threading.Lock()
    answered: Counter[str] = Counter()

    def ask(http: httpx.Client, number: int) -> None:
        name = f"a{random.Random(number).randrange(ADAPTERS):02}"
        # By name, by alias, by the base's name before it, and by version where it stays for good.
        fixed = f"{name}@1" if int(name[1:]) >= MORE else name
        model = (name, f"{name}@prod", f"{service.model}:{name}@prod", fixed)[number % 4]
        while (response := service.ask(model, 16, http, ignore_eos=False)).status_code == 429:
            time.sleep(0.02)  # told to come again: not lost
        assert response.status_code == 200, f"{model}: {response.text}"
        value = response.json()
        version, text = value["model"], value["choices"][0]["text"]
        assert text == administrator.says[version], (model, version)
        assert version.partition("@")[0] == name, (model, version)
        answered[version] += 1

    def client(works: Future[None]) -> None:
        with service.client() as http:
            while True:
                with taking:
                    number = next(left)
                if number >= REQUESTS and works.done():
                    return
                ask(http, number)

    stop = threading.Event()
    with ThreadPoolExecutor(ASKING + 1) as pool:
        works = pool.submit(administrator.work, stop)
        clients = [pool.submit(client, works) for _ in range(ASKING)]
        try:
            for done in clients:
                done.result()
        finally:
            stop.set()
        works.result()
    assert answered.total() >= REQUESTS
    assert any(version.endswith("@2") for version in answered)
    assert service.count("slot_evictions") > evicted
    service.until(lambda: service.count("running") == service.count("waiting") == 0)

    # What was removed is gone, and what stayed still says its word.
    def is_there(ref: str) -> bool:
        name, _, version = ref.partition("@")
        return int(version) in service.registry.versions(name)

    removed = [ref for ref in administrator.says if not is_there(ref)]
    assert len(removed) == MORE
    for ref in administrator.says.keys() - removed:
        value = service.ask(ref, tokens=16, ignore_eos=False).json()
        assert (value["model"], value["choices"][0]["text"]) == (ref, administrator.says[ref])
    for ref in removed:
        service.until(lambda ref=ref: service.ask(ref).status_code == 404)


def test_requests_at_work_end_before_it_stops(service: Any, says: Says) -> None:
    def ask_until_refused() -> list[tuple[int, str]]:
        """What is said to whom asks while it ends; there are always some whose answer goes on."""
        with contextlib.suppress(httpx.TransportError), service.client() as http:
            while (answer := service.ask("red@1", 200, http=http)).status_code == 200:
                assert answer.json()["choices"][0]["text"] == text
            refused = [answer, health] if (health := http.get("/health")).is_error else [answer]
            assert all(int(one.headers["retry-after"]) >= 1 for one in refused)
            return [(one.status_code, one.json()["error"]["code"]) for one in refused]
        return []

    text = says("lora", 200)
    events = service.stream("red@1", 600, temperature=0).iter_lines()
    first = next(events)  # it is at work, and goes on while the rest is read
    with ThreadPoolExecutor(ROWS) as pool:
        rest = pool.submit(heard, chain([first], events))
        others = [pool.submit(ask_until_refused) for _ in range(ROWS - 1)]
        assert service.stop(signal.SIGTERM) == 0, service.errors()
    assert rest.result() == (says("lora", 600), None)
    assert {said for one in others for said in one.result()} == {(503, "unavailable")}
    assert "Traceback" not in service.errors()
    assert service.lines.next() == "", "what Ray tells belongs to standard error"


def test_what_it_measured_is_in_the_history(service: Any) -> None:
    assert service.process.poll() is not None, "the test before this one stops it"
    with History.open(Storage.at(service.registry.root.parent).history_url) as history:
        metrics = history.get("made-red").metrics
    assert metrics["serving_requests"] > 0 and metrics["serving_adapter_bytes"] > 0
    assert metrics["serving_time_to_first_token_seconds"] > 0
    assert metrics["serving_tokens_per_second"] > 0 and metrics["eval_loss"] == 1.0


# Serve's own schemas, on import.
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field` is deprecated")
@pytest.mark.parametrize("name", ["local.yaml", "gpu.yaml"])
def test_serve_config_files_are_valid(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    written = yaml.safe_load((ROOT / "serve" / name).read_text())
    (application,) = ServeDeploySchema.model_validate(written).applications
    load_serve_config(application.args)
    assert application.import_path == "serve.app:app"
