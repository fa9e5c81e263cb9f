"""Clients that send or take too slowly, before rayfin's part of Serve's proxy: real sockets.

The same through Serve itself is in test_deployment.py.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import uvicorn

from rayfin.config.serving import ApiConfig
from rayfin.serving import connections
from rayfin.serving import proxy as proxy_module
from rayfin.serving.connections import BoundedProtocol, FairLimiter, client_of
from rayfin.serving.proxy import ClientLimits, ProxyMiddleware

PATIENCE = 540.0
SHORT = 0.3
HEAD = b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"


@dataclass
class Behind:
    """The application behind the proxy: what it was asked, and how its answers end."""

    paths: list[str] = field(default_factory=list)
    headers: list[list[tuple[bytes, bytes]]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.paths.append(scope["path"])
        self.headers.append(scope["headers"])
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(body)
        kind = b"text/event-stream" if scope["path"].endswith("events") else b"application/json"
        start = {"type": "http.response.start", "status": 200}
        match scope["path"]:
            case "/echo" | "/health":
                await send(start | {"headers": [(b"content-type", kind), (b"x-request-id", b"2")]})
                await send({"type": "http.response.body", "body": body})
            case "/endless":
                await send(start | {"headers": [(b"content-type", kind)]})
                try:
                    while (await asyncio.wait_for(receive(), 0.001)).get("type") is None:
                        pass
                except TimeoutError:
                    pass
                leaves = asyncio.ensure_future(receive())
                while not leaves.done():
                    part = {"type": "http.response.body", "body": b"x" * 65536, "more_body": True}
                    await send(part)
                    await asyncio.sleep(0)
                self.gone.set()
            case "/broken-events" | "/broken":
                await send(start | {"headers": [(b"content-type", kind)]})
                text = b"data: {}\n\n"
                await send({"type": "http.response.body", "body": text, "more_body": True})
            case "/silent":
                pass
            case "/raises" | "/raises-events":
                if scope["path"].endswith("events"):
                    await send(start | {"headers": [(b"content-type", kind)]})
                raise ZeroDivisionError(scope["path"])
            case path:
                status, _, words = path.removeprefix("/plain/").partition("/")
                headers = [(b"content-type", b"text/plain; charset=utf-8")]
                await send({**start, "status": int(status), "headers": headers})
                await send({"type": "http.response.body", "body": words.encode()})


@dataclass
class Proxy:
    port: int
    behind: Behind

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, data: bytes = b"") -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        client.sendall(data)
        return client

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE, **more)


@contextmanager
def proxy(**limits: Any) -> Iterator[Proxy]:
    found = vars(ClientLimits.of(ApiConfig(**limits)))
    behind = Behind()
    app = ProxyMiddleware(behind, lambda: found)
    settings = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        log_level="critical",
        http=BoundedProtocol,
        ws="none",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        served = Proxy(server.servers[0].sockets[0].getsockname()[1], behind)
        served.get("/health")  # the limits are known from the first request on
        yield served
    finally:
        server.should_exit = True
        thread.join(PATIENCE)


def until(true: Callable[[], Any]) -> None:
    give_up = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < give_up, "it did not come about"
        time.sleep(0.01)


def read(client: socket.socket) -> tuple[int, Any]:
    """Status and error (or text) of the answer, after which the connection is at its end."""
    data = b""
    while part := client.recv(65536):
        data += part
    client.close()
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"] if body[:1] == b"{" else body


def test_a_body_that_trickles_is_ended_and_reaches_nobody() -> None:
    with proxy(body_seconds=SHORT) as served:
        status, error = read(served.connect(HEAD % 1000 + b"{"))
        assert status == 408 and "0.3 s" in error["message"]
        assert served.behind.paths == ["/health"]


@pytest.mark.parametrize("sent", [b"", b"POST /echo HTTP/1.1\r\nhost:"])
def test_a_head_that_does_not_come_ends_its_connection(sent: bytes) -> None:
    with proxy(body_seconds=SHORT) as served:
        client = served.connect(sent)
        if sent:
            assert read(client)[0] == 408
        else:
            assert client.recv(1) == b""
            client.close()


def test_an_upload_whose_time_is_up_gives_way_to_no_one_elses_harm() -> None:
    """The oldest upload's own timer fires in the turn of the event loop in which it gives way."""

    async def ask(app: ProxyMiddleware, body: bytes | None) -> int:
        statuses: list[int] = []

        async def receive() -> dict[str, Any]:
            if body is None:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            statuses.extend([message["status"]] if "status" in message else [])

        await app(_post("/echo"), receive, send)
        return statuses[0]

    async def race() -> list[int]:
        app = ProxyMiddleware(
            Behind(), lambda: vars(ClientLimits.of(ApiConfig(max_client_uploads=1)))
        )
        await ask(app, b"first")  # the limits are known
        app._uploads._grace = 0.0
        stalled = asyncio.create_task(ask(app, None))
        while not len(app._uploads):
            await asyncio.sleep(0)
        (upload,) = app._uploads._held["10.0.0.1"]
        upload.deadline.reschedule(asyncio.get_running_loop().time())
        return await asyncio.gather(asyncio.create_task(ask(app, b"whole")), stalled)

    assert asyncio.run(race()) == [200, 408]


def _post(path: str) -> dict[str, Any]:
    headers = [(b"content-length", b"5")]
    return {"type": "http", "path": path, "client": ("10.0.0.1", 5), "headers": headers}


def test_limits_of_another_version_and_a_look_that_hangs_do_no_harm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the deployment is updated, another version publishes other fields."""
    monkeypatch.setattr(proxy_module, "_REFRESH_SECONDS", -1.0)  # every request is a reason to read
    leave, looks = threading.Event(), 0

    def look() -> dict[str, Any]:
        nonlocal looks
        looks += 1
        if looks > 1:
            leave.wait(PATIENCE)
        return {"max_body_bytes": 4, "of_the_next_version": 1}

    async def ask(app: ProxyMiddleware) -> int:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await app(_post("/echo"), asyncio.Event().wait, send)
        await asyncio.sleep(0)  # a look that is due begins
        return int(sent[0]["status"])

    async def ask_often() -> list[int]:
        app = ProxyMiddleware(Behind(), look)
        answers = [await ask(app) for _ in range(5)]
        while looks < 2:  # its thread begins when it may
            await asyncio.sleep(0.001)
        answers += [await ask(app) for _ in range(5)]
        leave.set()
        return answers

    assert asyncio.run(ask_often()) == [413] * 10
    assert looks == 2, "one was begun while another one ran"


def test_too_many_slow_bodies_of_one_client_end_its_oldest_and_nobody_elses() -> None:
    with proxy(max_client_uploads=10) as served:
        slow = [served.connect(HEAD % 1000 + b"{") for _ in range(30)]
        until(lambda: served.get("/health").is_success)

        def ended() -> list[socket.socket]:
            return [one for one in slow if _has_answer(one)]

        def one_more_ends_all_but_ten() -> bool:
            answer = httpx.post(served.url + "/echo", content=b"whole", timeout=PATIENCE)
            assert answer.status_code == 200 and answer.content == b"whole"
            return len(ended()) >= 21

        until(one_more_ends_all_but_ten)
        refused = ended()
        assert refused == slow[:21], "the eleventh gave way to the one that came whole"
        for client in slow:
            if client in refused:
                status, error = read(client)
                assert status == 429 and error["code"] == "overloaded"
            else:
                client.close()


def _has_answer(client: socket.socket) -> bool:
    return _next_byte(client) not in (None, b"")


def test_health_answers_beside_many_slow_bodies_and_heads() -> None:
    with proxy() as served:
        slow = [served.connect(HEAD % 1000 + b"{" if i % 2 else b"GET") for i in range(400)]
        answers = [served.get("/health").status_code for _ in range(20)]
        assert answers == [200] * 20
        for client in slow:
            client.close()


def test_where_connections_use_up_the_files_the_greediest_client_gives_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BoundedProtocol, "_waiting", FairLimiter(20, 10))
    with proxy() as served:
        idle = [served.connect() for _ in range(40)]
        until(lambda: sum(_closed(one) for one in idle) >= 30)
        assert served.get("/health").is_success
        assert not any(_closed(one) for one in idle[-5:])
        for client in idle:
            client.close()


def _closed(client: socket.socket) -> bool:
    return _next_byte(client) == b""


def _next_byte(client: socket.socket) -> bytes | None:
    """Without taking it: empty at the end, None where nothing has come."""
    client.settimeout(0.0)
    try:
        return client.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return None
    except ConnectionResetError:
        return b""
    finally:
        client.settimeout(PATIENCE)


def test_a_client_that_takes_nothing_of_its_answer_is_disconnected() -> None:
    with proxy(write_seconds=SHORT) as served:
        client = served.connect(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n")
        assert served.behind.gone.wait(PATIENCE), "its answer still waits for it"
        client.close()


def test_a_client_that_takes_its_answer_slowly_but_surely_gets_it() -> None:
    with proxy(write_seconds=60.0) as served:
        client = served.connect(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n")
        taken = 0
        while taken < 30 * 2**20:
            taken += len(part := client.recv(2**20))
            assert part, "it was cut off"
        client.close()
        assert served.behind.gone.wait(PATIENCE)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health HTTP/1.1\r\nhost: x\r\na: " + b"b" * 100_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\na: " + b"b" * 400_000,
        b"GET /" + b"a" * 400_000,
        b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
    ],
    ids=["one header", "no end", "the path", "many headers"],
)
def test_a_head_that_is_too_large_is_refused(sent: bytes) -> None:
    with proxy() as served:
        client = served.connect()
        sender = threading.Thread(target=_send, args=(client, sent))
        sender.start()
        head = client.recv(4096).partition(b"\r\n\r\n")[0]
        assert head.startswith(b"HTTP/1.1 431") and head.count(b"x-request-id: ") == 1
        sender.join()
        client.close()
        assert served.behind.paths == ["/health"]


def _send(client: socket.socket, data: bytes) -> None:
    with suppress(OSError):  # it may be refused before all of it has come
        client.sendall(data)


def test_a_body_that_is_too_large_is_refused_unread() -> None:
    with proxy(max_body_bytes=1024) as served:
        assert read(served.connect(HEAD % 2000))[0] == 413
        chunked = b"POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        assert read(served.connect(chunked + b"800\r\n" + b"x" * 2048 + b"\r\n"))[0] == 413
        assert served.behind.bodies == [b""]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/plain/404/Path not found", 503, "unavailable"),
        ("/plain/503/Deployment is unavailable", 503, "unavailable"),
        ("/plain/429/too many", 429, "overloaded"),
        ("/plain/500/Internal Server Error", 500, "internal_error"),
        ("/silent", 503, "replica_lost"),
        ("/raises", 500, "internal_error"),
    ],
)
def test_every_error_is_in_the_envelope(path: str, status: int, code: str | None) -> None:
    with proxy() as served:
        answer = served.get(path)
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == code
        assert answer.headers["x-request-id"]
        if status != 500:  # a client that is told so tries again
            assert int(answer.headers["retry-after"]) >= 1


def test_a_stream_that_breaks_off_ends_with_an_error_and_not_with_done() -> None:
    with proxy() as served:
        text = served.get("/broken-events").text
        assert text.startswith("data: {}\n\n") and "[DONE]" not in text
        assert json.loads(text.split("data: ")[-1])["error"]["code"] == "replica_lost"
        text = served.get("/raises-events").text
        assert json.loads(text.removeprefix("data: "))["error"]["code"] == "internal_error"
        with pytest.raises(httpx.RemoteProtocolError):  # no JSON may look whole
            served.get("/broken")


@pytest.mark.parametrize("given", [None, "my-request.7", "a b", "x" * 129, "ü", "a\x1bb"])
def test_there_is_one_request_id_and_the_clients_is_kept(given: str | None) -> None:
    with proxy() as served:
        headers = {} if given is None else {"x-request-id": given.encode("latin-1")}
        if given == "a\x1bb":
            client = served.connect(b"GET /health HTTP/1.0\r\nx-request-id: a\x1bb\r\n\r\n")
            assert read(client)[0] == 400
            return
        answer = served.get("/health", headers=headers)
        (name,) = answer.headers.get_list("x-request-id")
        inside = [v for n, v in served.behind.headers[-1] if n == b"x-request-id"]
        assert inside == [name.encode()]
        assert (name == given) == (given == "my-request.7")


def test_headers_that_steer_serve_are_no_clients_business() -> None:
    with proxy() as served:
        steering = {
            "x-request-disconnect-disabled": "?1",
            "x-request-timeout-seconds": "0.001",
            "x-session-id": "a",
            "serve_multiplexed_model_id": "b",
            "accept-language": "de",
        }
        served.get("/health", headers=steering)
        names = {name.decode() for name, _ in served.behind.headers[-1]}
        assert names & steering.keys() == {"accept-language"}


@pytest.mark.parametrize("path", ["/-/echo", "/-/healthz/x"])
def test_only_serves_own_pages_pass_by(path: str) -> None:
    with proxy(body_seconds=SHORT) as served:
        slow = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{" % path.encode()
        assert read(served.connect(slow))[0] == 408
        assert served.behind.paths == ["/health"]


def test_a_websocket_is_plain_http_here() -> None:
    with proxy() as served:
        upgrade = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-key": "x"}
        assert served.get("/health", headers=upgrade).status_code == 200


def test_clients_are_counted_by_their_network() -> None:
    assert client_of(("10.0.0.1", 5)) == client_of(("::ffff:10.0.0.1", 6)) == "10.0.0.1"
    assert client_of(("2001:db8::1", 1)) == client_of(("2001:db8::ffff:2", 1))
    assert client_of(("2001:db8::1", 1)) != client_of(("2001:db8:1::1", 1))
    assert client_of(None) == ""


def test_the_oldest_of_the_greediest_gives_way_and_what_is_new_stays() -> None:
    now = 0.0
    turns: FairLimiter[int] = FairLimiter(5, 4, grace=1.0, clock=lambda: now)
    for number in range(5):
        assert turns.add("greedy" if number < 3 else "modest", number) == []
    assert turns.add("other", 5) == [], "all are new"
    now = 2.0
    assert turns.add("other", 6) == [0, 1] and len(turns) == 5
    turns.remove("other", 6)
    turns.remove("other", 6)
    assert len(turns) == 4


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    yield
    limits = ClientLimits.of(ApiConfig())
    connections.TIMEOUTS.request = limits.body_seconds
    connections.TIMEOUTS.answer = limits.write_seconds
