"""What an operator sees: health, metrics and the request log."""

import asyncio
import json
import os
import resource
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from rayfin.adapters import Registry
from rayfin.config.serving import ServeConfig
from rayfin.errors import StorageError
from rayfin.serving.api.app import create_app
from rayfin.serving.api.request_log import RequestLog, RequestRecord
from rayfin.serving.model_names import ModelNames


def samples(server: Any) -> dict[tuple[str, ...], float]:
    """(name, label values …) -> value of everything in /metrics."""
    response = server.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


@pytest.fixture
def watched(tools: Any, engines: Any, tiny: str, registry: Registry) -> Iterator[Any]:
    engine = engines(tiny, max_rows=4, slots=1)
    with tools.serving(engine, registry, tools.ApiConfig(max_adapter_labels=1)) as server:
        yield server


def test_metrics_count_by_adapter_and_status(watched: Any) -> None:
    for _ in range(2):
        assert watched.complete(model="support", max_tokens=5, ignore_eos=True).is_success
    assert watched.complete(model="support@1", max_tokens=1).is_success
    assert watched.complete(model="tiny", stream=True).is_success
    assert watched.complete(model="missing").status_code == 404
    assert watched.complete(model="tiny", n=0).status_code == 400
    seen = samples(watched)
    requests = "rayfin_requests_total"
    assert seen[requests, "support", "200"] == 3
    assert seen[requests, "tiny", "200"] == 1
    assert seen[requests, "other", "404"] == 1
    assert seen[requests, "other", "400"] == 1
    assert seen["rayfin_generated_tokens_total", "support"] == 11
    assert seen["rayfin_prompt_tokens_total", "support"] == 15
    assert seen["rayfin_time_to_first_token_seconds_count", "support"] == 3
    # An answer of one token has no time between tokens.
    assert seen["rayfin_time_per_output_token_seconds_count", "support"] == 2
    assert seen["rayfin_engine_slot_fills_total",] == 2
    assert seen["rayfin_engine_slot_hits_total",] == 1
    assert seen["rayfin_engine_slot_evictions_total",] == 1
    assert seen["rayfin_engine_waiting",] == seen["rayfin_engine_running",] == 0
    assert seen["rayfin_engine_resident",] == 1


def test_labels_are_bounded(watched: Any, registry: Registry) -> None:
    for number in range(50):
        watched.complete(model=f"made-up-{number}")
    assert watched.complete(model="sales").is_success  # the first, and the only one of its own
    assert watched.complete(model="support").is_success
    labels = {key[1] for key in samples(watched) if key[0] == "rayfin_requests_total"}
    assert labels == {"other", "sales"}


def test_two_apps_have_figures_of_their_own(
    tools: Any, engine: Any, shared_registry: Registry
) -> None:
    with (
        tools.serving(engine, shared_registry, tools.ApiConfig()) as one,
        tools.serving(engine, shared_registry, tools.ApiConfig()) as other,
    ):
        assert one.complete().is_success
        assert samples(one)["rayfin_requests_total", "tiny", "200"] == 1
        assert ("rayfin_requests_total", "tiny", "200") not in samples(other)


def test_health_is_ok_until_the_engine_stops_working(watched: Any) -> None:
    assert watched.complete(model="sales").is_success
    health = watched.http.get("/health")
    assert health.status_code == 200
    assert health.json() == {"status": "ok", "waiting": 0, "running": 0, "resident": ["sales@1"]}
    watched.engine.failure = MemoryError("no memory")
    assert watched.http.get("/health").status_code == 503
    watched.engine.failure = None


@pytest.mark.parametrize("text", [False, True])
def test_the_log_has_a_line_for_each_request(
    tools: Any, engine: Any, shared_registry: Registry, tmp_path: Path, text: bool
) -> None:
    path = tmp_path / "logs" / "requests.jsonl"
    config = tools.ApiConfig(request_log=str(path), request_log_text=text)
    with tools.serving(engine, shared_registry, config) as server:
        whole = server.complete(model="support@prod", prompt="sécret", ignore_eos=True)
        stream = server.chat("tiny", stream=True, ignore_eos=True)
        server.complete(model="missing", prompt="sécret")
        server.http.get("/v1/models")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["status"] for line in lines] == [200, 200, 404]
    assert [line["answered_by"] for line in lines] == ["support@1", "tiny", None]
    assert [line["model"] for line in lines] == ["support@prod", "tiny", "missing"]
    assert lines[0]["prompt_tokens"] == whole.json()["usage"]["prompt_tokens"]
    assert [line["completion_tokens"] for line in lines] == [2, 2, 0]
    assert lines[0]["finish_reasons"] == ["length"]
    assert whole.headers["x-request-id"] == lines[0]["request_id"]
    assert lines[0]["seconds"] >= lines[0]["seconds_to_first_token"] > 0
    if text:
        assert lines[0]["prompt"] == "sécret"
        assert lines[0]["answers"] == [whole.json()["choices"][0]["text"]]
        assert lines[1]["prompt"] == [{"role": "user", "content": "hello"}]
        events = [line[6:] for line in stream.text.split("\n\n") if line.startswith("data: {")]
        deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
        assert lines[1]["answers"] == ["".join(delta.get("content", "") for delta in deltas)]
    else:
        assert all("prompt" not in line and "answers" not in line for line in lines)
    # What people asked is not for everybody on the machine.
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("given", ["checkout-17.a", "two words", "x" * 200, "a\tb"])
def test_the_clients_request_id_is_kept_and_logged(
    tools: Any, engine: Any, shared_registry: Registry, tmp_path: Path, given: str
) -> None:
    path = tmp_path / "requests.jsonl"
    config = tools.ApiConfig(request_log=str(path))
    with tools.serving(engine, shared_registry, config) as server:
        body = {"model": "tiny", "prompt": "hi", "max_tokens": 1}
        headers = {"x-request-id": given}
        one, two = (server.http.post("/v1/completions", json=body, headers=headers) for _ in "ab")
        assert one.json()["id"] != two.json()["id"], "what the client calls it names no answer"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for response, line in zip((one, two), lines, strict=True):
        (told,) = response.headers.get_list("x-request-id")
        assert told == line["request_id"]
        assert (told == given) == (given == "checkout-17.a")


def test_two_requests_of_one_id_are_answered_at_once(tools: Any, engine: Any, server: Any) -> None:
    def ask(_: int) -> int:
        body = {"model": "tiny", "prompt": "hi", "max_tokens": 64, "ignore_eos": True}
        headers = {"x-request-id": "the-same"}
        with httpx.Client(base_url=server.url, timeout=540) as http:
            return http.post("/v1/completions", json=body, headers=headers).status_code

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ask, range(4))) == [200] * 4


@pytest.mark.parametrize(
    "path",
    ["/health", "/metrics", "/v1/models", "/v1/models/support", "/openapi.json", "/tokenize"],
)
def test_head_is_answered_as_get_without_the_body(server: Any, path: str) -> None:
    got, head = server.http.get(path), server.http.head(path)
    assert head.status_code == got.status_code == (405 if path == "/tokenize" else 200)
    assert head.headers["content-type"] == got.headers["content-type"]
    assert got.content and head.content == b"" and int(head.headers["content-length"]) > 0


def test_names_and_prompts_forge_no_line_of_a_log_or_a_terminal(
    tools: Any, engine: Any, shared_registry: Registry, tmp_path: Path, caplog: Any
) -> None:
    path = tmp_path / "requests.jsonl"
    evil = '\n{"status": 200}\r\x1b[31mred\x1b]0;title\x07\x9b2J\u2028'
    config = tools.ApiConfig.model_validate(
        {"request_log": str(path), "request_log_text": True, "api_keys": [{"key": KEY}]}
    )
    with tools.serving(engine, shared_registry, config) as server:
        server.http.headers["authorization"] = f"Bearer {KEY}"
        whole = server.complete(prompt=evil)
        missing = server.complete(model=f"support{evil}")
        also = server.complete(model=f"other:{evil}")
    assert [r.status_code for r in (whole, missing, also)] == [200, 404, 404]
    written = path.read_bytes()
    lines = written.splitlines()
    assert [json.loads(line)["status"] for line in lines] == [200, 404, 404]
    assert json.loads(lines[0])["prompt"] == evil
    # In the file, in what the server says of it, and in the answers: escapes, nothing that acts.
    said = written.replace(b"\n", b"") + caplog.text.replace("\n", "").encode()
    for text in (said, missing.content, also.content):
        assert not any(byte < 32 or byte == 127 for byte in text)
        assert b"\xc2\x9b" not in text and b"\xe2\x80\xa8" not in text
    assert KEY.encode() not in said


KEY = "key-that-nobody-may-read"


def test_a_log_that_cannot_be_written_is_said_at_the_start(
    tools: Any, engine: Any, shared_registry: Registry, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    config = tools.ApiConfig(request_log=str(tmp_path / "file" / "log.jsonl"))
    with pytest.raises(StorageError, match="request_log"):
        create_app(engine, ModelNames(shared_registry, "tiny"), ServeConfig(api=config))


@contextmanager
def stalled(path: Path) -> Iterator[int]:
    """A pipe at `path` that takes nothing before it is read from; yields where to read."""
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    try:
        # Page by page: a pipe takes so much whole or not at all.
        while True:
            os.write(writer, b"\n" * 4096)
    except BlockingIOError:
        pass
    os.close(writer)
    try:
        yield reader
    finally:
        os.close(reader)


def lines_of(reader: int, count: int) -> list[Any]:
    """The next `count` lines of JSON that come out of the pipe."""
    os.set_blocking(reader, True)
    with os.fdopen(reader, closefd=False) as stream:
        lines = (line for line in stream if line.strip())
        return [json.loads(next(lines)) for _ in range(count)]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for name, _, text in caplog.record_tuples if name.endswith("api.request_log")]


def test_no_request_waits_for_the_logs_disk(
    tools: Any, engine: Any, shared_registry: Registry, tmp_path: Path
) -> None:
    path = tmp_path / "pipe"
    with stalled(path) as reader:
        config = tools.ApiConfig(request_log=str(path))
        with tools.serving(engine, shared_registry, config) as server:
            server.http.timeout = 120  # the test's own bound is longer
            statuses = [server.complete(model=m).status_code for m in ("tiny", "missing", "tiny")]
            assert statuses == [200, 404, 200]
            assert [line["status"] for line in lines_of(reader, 3)] == statuses


def test_what_a_slow_disk_does_not_take_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "pipe"
    with stalled(path) as reader:
        log = RequestLog(str(path), text=False, most_waiting=2000)
        for number in range(100):
            log.write(RequestRecord(f"/{number}"))
        (warning,) = warnings_of(caplog)
        assert "takes no more now" in warning
        written = os.read(reader, 2**16)  # the disk goes on
        log.close()
        with os.fdopen(reader, "rb", closefd=False) as stream:
            written += stream.read()
    lines = [json.loads(line) for line in written.splitlines() if line]
    assert [line["path"] for line in lines] == [f"/{n}" for n in range(len(lines))]
    assert 1 < len(lines) < 10
    assert warnings_of(caplog)[1:] == [f"request_log '{path}' lost {100 - len(lines)} lines"]


def test_a_full_disk_ends_no_request(
    tools: Any, engine: Any, shared_registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    config = tools.ApiConfig(request_log="/dev/full")
    with tools.serving(engine, shared_registry, config) as server:
        assert [server.complete().status_code for _ in range(3)] == [200] * 3
    began, ended = warnings_of(caplog)
    assert "loses lines (No space left on device); serving goes on" in began
    assert "lost 3 lines" in ended


def test_a_line_cut_off_by_a_full_disk_takes_no_other_along(tools: Any, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = RequestLog(str(path), text=False)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        log.write(RequestRecord("/cut"))
        tools.wait_until(lambda: path.stat().st_size == 100, "the disk is full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.write(RequestRecord("/whole"))
    log.close()
    cut, whole = path.read_text().splitlines()
    assert len(cut) == 100
    assert json.loads(whole)["path"] == "/whole"


def test_logs_that_share_a_file_tear_no_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    logs = [RequestLog(str(path), text=False) for _ in range(4)]
    for number in range(200):
        for log in logs:
            log.write(RequestRecord(f"/{number}" + "x" * 5000))
    for log in logs:
        log.close()
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 800


def test_health_waits_for_no_lookup_and_has_a_place_beside_them(
    engine: Any, shared_registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names are looked up on a disk that stalls: eight at a time, and two wait."""
    leave = threading.Event()
    names = ModelNames(shared_registry, "tiny")
    resolve, entered = names.resolve, []

    def stalls(model: str, **more: Any) -> Any:
        entered.append(model)
        leave.wait(540)
        return resolve(model, **more)

    monkeypatch.setattr(names, "resolve", stalls)
    app = create_app(engine, names, ServeConfig(), max_requests=10)

    async def ask() -> tuple[list[int], list[int]]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            looks = [asyncio.create_task(http.get(f"/v1/models/support@{n}")) for n in range(1, 11)]
            while len(entered) < 8:
                await asyncio.sleep(0.01)
            beyond = http.get("/v1/models/support@11")
            others = [(await one).status_code for one in (http.get("/health"), beyond)]
            leave.set()
            return others, [(await one).status_code for one in looks]

    try:
        others, looks = asyncio.run(asyncio.wait_for(ask(), 60.0))
    finally:
        leave.set()
    assert others == [200, 429]
    assert set(looks) <= {200, 404}
