"""Whatever comes in, what goes out is an answer or OpenAI's error envelope."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from rayfin.adapters import Registry
from rayfin.config.schema import ModelConfig
from rayfin.models import base_of

PATHS = {
    "/v1/completions": {"model": "tiny", "prompt": "hi", "max_tokens": 1},
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 1,
    },
}


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and "\n" not in body["error"]["message"]
    assert len(body["error"]["message"]) < 1000
    error: dict[str, Any] = body["error"]
    return error


BAD_FIELDS = {
    "temperature": [-0.1, 2.1, "1", True, [], 1e308],
    "top_p": [0, 1.1, "x"],
    "top_k": [-2, 1.5, 10**30],
    "min_p": [-1, 2],
    "repetition_penalty": [0, -1],
    "presence_penalty": [3],
    "frequency_penalty": [-3],
    "max_tokens": [0, -1, 1.5, "10"],
    "n": [0, -1, 10**6, 10**30, 1.5],
    "seed": [1.5, "x", 10**30],
    "stop": [1, [1], [""], ["x"] * 17, "y" * 1000, {}],
    "stream": ["yes", 1],
    "stream_options": [{"include_usage": True}, {"unknown": 1}, []],
    "model": [None, 1, [], {"a": 1}],
    "tools": [[{"type": "function", "function": {"name": "f"}}]],
    "response_format": [{"type": "json_object"}],
    "logit_bias": [{"1": 5}],
    "temprature": [1],
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in BAD_FIELDS.items() for value in values],
    ids=lambda value: repr(value)[:24],
)
def test_a_bad_field_is_400_and_named(server: Any, path: str, field: str, value: Any) -> None:
    response = server.http.post(path, json=PATHS[path] | {field: value})
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert field in (error["param"] or error["message"])


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("messages", [], "should be a list of at least 1"),
        ("stop", ["x"] * 17, "a list of at most 16"),
        ("metadata", {str(i): "x" for i in range(17)}, "a dictionary of at most 16"),
    ],
)
def test_an_error_about_a_length_is_a_sentence(
    server: Any, field: str, value: Any, allowed: str
) -> None:
    message = error_of(server.chat(**{field: value}))["message"]
    assert allowed in message
    assert "should have" not in message and "validation" not in message


@pytest.mark.parametrize(
    "prompt",
    [None, 1, [], [[]], [1.5], ["a", 1], [[1], "a"], "", [-1], [10**6], [2**31], ["a"] * 17],
    ids=lambda value: repr(value)[:20],
)
def test_a_bad_prompt_is_400(server: Any, prompt: Any) -> None:
    response = server.complete(prompt=prompt)
    assert response.status_code == 400, response.text
    error_of(response)


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hi",
        ["hi"],
        [{}],
        [{"role": "wizard", "content": "hi"}],
        [{"role": "user", "content": 1}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": "hi", "extra": 1}],
        [{"role": "user", "content": "hi"}] * 3000,
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_messages_are_400(server: Any, messages: Any) -> None:
    response = server.chat(messages=messages)
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == "messages"


@pytest.mark.parametrize("path", [*PATHS, "/tokenize"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"model": "tiny", "prompt": "hi", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "hi", "temperature": -Infinity}',
        b'{"model": "tiny", "prompt": "hi", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "hi", "seed": ' + b"9" * 10_000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "tiny", "metadata": ' + b'{"a":' * 500 + b"1" + b"}" * 501,
        b'{"model": "tiny", "prompt": ' + b"[" * 500 + b"]" * 500 + b"}",
    ],
    ids=lambda body: repr(body)[:40],
)
def test_what_is_no_json_of_ours_is_400(server: Any, path: str, body: bytes) -> None:
    response = server.http.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    error_of(response)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v2/models", 404),
        ("POST", "/v1/completions/", 404),
        ("POST", "/v1/load_lora_adapter", 404),  # off by default
        ("POST", "/v1/unload_lora_adapter", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", "/health", 405),
    ],
)
def test_wrong_paths_and_methods(server: Any, method: str, path: str, status: int) -> None:
    response = server.http.request(method, path)
    assert response.status_code == status
    error_of(response)
    if status == 405:
        assert response.headers["allow"]


@pytest.mark.parametrize(
    "name",
    ["..%2fsupport", "%2e%2e", "..%5csupport", "%2fetc%2fpasswd", "support%00", "%ff", "a" * 5000],
)
def test_hostile_names_in_the_path_are_404(server: Any, name: str) -> None:
    response = server.http.get(f"/v1/models/{name}")
    assert response.status_code == 404
    error_of(response)


@pytest.mark.parametrize("name", ["../support", "..\\support", "/etc/passwd", "support\0"])
def test_hostile_names_in_the_body_are_404(server: Any, name: str) -> None:
    for response in (server.complete(model=name), server.chat(name)):
        assert response.status_code == 404
        error_of(response)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:,x"}},
        {"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}},
        {"type": "file", "file": {"file_id": "x"}},
        {"text": "hi"},
        "hi",
    ],
    ids=lambda part: str(part)[:24],
)
def test_a_part_that_is_no_text_is_one_sentence_without_our_types(server: Any, part: Any) -> None:
    text = {"type": "text", "text": "what is it?"}
    response = server.chat(messages=[{"role": "user", "content": [text, part]}])
    assert response.status_code == 400
    error = error_of(response)
    kind = repr(part["type"]) if "type" in part else "such a part"
    assert error["message"].startswith("messages.0.content: ") and kind in error["message"]
    assert "text alone" in error["message"] and ";" in error["message"]
    for inside in ("list[", "TextPart", "Extra inputs", "valid string", ".str"):
        assert inside not in error["message"]
    part = {"type": "text", "text": 5}
    response = server.chat(messages=[{"role": "user", "content": [part]}])
    assert "TextPart" not in error_of(response)["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_has_openais_code(server: Any, stream: bool) -> None:
    for response in (
        server.complete(prompt="x" * 600, stream=stream),
        server.complete(prompt="x" * 510, model="sales", stream=stream),
        server.chat(messages=[{"role": "user", "content": "x" * 600}], stream=stream),
    ):
        assert response.status_code == 400
        error = error_of(response)
        assert error["code"] == "context_length_exceeded"
        asked = "messages" if "chat" in response.url.path else "prompt"
        assert (error["param"], error["type"]) == (asked, "invalid_request_error")


def test_a_prompt_without_room_is_400(server: Any) -> None:
    response = server.complete(prompt="x" * 600)
    assert response.status_code == 400
    assert "max_length" in error_of(response)["message"]
    # The virtual tokens of an adapter take room too.
    assert server.complete(prompt="x" * 510).status_code == 200
    response = server.complete(prompt="x" * 510, model="sales")
    assert response.status_code == 400
    assert "virtual" in error_of(response)["message"]


@pytest.mark.parametrize("told", [True, False])
def test_a_body_of_100_mb_is_refused_before_it_is_in(server: Any, told: bool) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(2**20)

    headers = {"content-type": "application/json"}
    if told:
        headers["content-length"] = str(100 * 2**20)
    response = server.http.post("/v1/completions", content=body(), headers=headers)
    assert response.status_code == 413 and response.headers["connection"] == "close"
    error_of(response)
    assert server.complete().status_code == 200


def test_a_body_just_within_the_limit_is_read(
    tools: Any, engine: Any, shared_registry: Registry
) -> None:
    with tools.serving(engine, shared_registry, tools.ApiConfig(max_body_bytes=2000)) as server:
        body = json.dumps({"prompt": "hi"}).encode()
        url = "/tokenize"
        assert server.http.post(url, content=body.ljust(2000)).status_code == 200
        assert server.http.post(url, content=body.ljust(2001)).status_code == 413


def test_a_slow_client_is_sent_away(tools: Any, engine: Any, shared_registry: Registry) -> None:
    with (
        tools.serving(engine, shared_registry, tools.ApiConfig(body_seconds=0.1)) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=540) as client,
    ):
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n" + b'{"model'
        )
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")


def test_a_registry_that_cannot_be_read_is_a_503_that_says_little(
    tools: Any, engine: Any, registry: Registry
) -> None:
    with tools.serving(engine, registry, tools.ApiConfig()) as server:
        hidden = registry.root.with_name("hidden")
        registry.root.rename(hidden)
        registry.root.write_text("not a directory")
        response = server.complete(model="support")
        assert response.status_code == 503
        error = error_of(response)
        assert error["type"] == "server_error"
        assert str(registry.root) not in error["message"]
        with pytest.raises(openai.InternalServerError):
            server.client().models.list()
        # The base needs no registry; and all is well when it is back.
        assert server.complete().status_code == 200
        registry.root.unlink()
        hidden.rename(registry.root)
        assert server.complete(model="support").status_code == 200


def test_an_adapter_that_cannot_be_loaded_says_why_and_harms_no_other(
    tools: Any, engine: Any, registry: Registry
) -> None:
    weights = registry.root / "support" / "2" / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(b"\x80\x04K\x01.")  # a pickle
    registry.promote("sales", 1, "stable")
    with tools.serving(engine, registry, tools.ApiConfig()) as server:
        # Under another name than other tests use, so that the engine doesn't hold it yet.
        registry.publish("broken", registry.root / "support" / "1")
        published = registry.root / "broken" / "1" / "adapter_model.safetensors"
        published.chmod(0o644)
        published.write_bytes(b"\x80\x04K\x01.")
        for stream in (False, True):
            response = server.complete(model="broken", stream=stream)
            assert response.status_code == 400, response.text
            error = error_of(response)
            assert "broken" in error["message"]
            assert str(registry.root) not in error["message"]
        assert server.complete(model="sales@stable").status_code == 200


def test_an_adapter_of_another_base_is_not_listed_and_says_why(
    tools: Any, engine: Any, registry: Registry
) -> None:
    told = {"base_model": "/data/models/llama", "base_identity": ["local@0123456789abcdef"]}
    (content,) = base_of(ModelConfig(name=engine.model_name)).identities
    registry.publish("foreign", registry.resolve("support@1").path, told, alias="prod")
    config = tools.ApiConfig.model_validate(
        {"api_keys": [{"key": "all"}, {"key": "sales", "adapters": ["sales"]}]}
    )
    with tools.serving(engine, registry, config) as server:
        for key, refs in (("all", ["foreign@1"]), ("sales", [])):
            listed = server.http.get("/v1/models", headers={"authorization": f"Bearer {key}"})
            assert listed.json()["not_served"] == refs
            assert not [one for one in listed.json()["data"] if "foreign" in one["id"]]
        server.http.headers["authorization"] = "Bearer all"
        listed = {model.id.partition("@")[0] for model in server.client("all").models.list()}
        assert listed == {"tiny", "sales", "support"}, "OpenAI's client takes the longer answer"
        for response in (
            server.http.get("/v1/models/foreign"),
            server.complete(model="foreign@prod"),
            server.complete(model="foreign", stream=True),
        ):
            assert response.status_code == 400
            message = error_of(response)["message"]
            assert message == (
                "adapter 'foreign@1': it was trained on 'llama' (local@0123456789abcdef), and the "
                f"served base is 'tiny' ({content}); "
                "whoever runs the server finds the remedy in its log"
            )


def test_a_version_removed_before_it_was_loaded_is_not_found(
    tools: Any, engine: Any, registry: Registry
) -> None:
    source = registry.root / "support" / "1"
    for _ in range(2):
        registry.publish("brief", source)
    with tools.serving(engine, registry, tools.ApiConfig()) as server:
        for version in (1, 2):  # remembered, and not loaded
            assert server.http.get(f"/v1/models/brief@{version}").status_code == 200
        assert server.http.get("/v1/models/brief").json()["root"] == "brief@2"
        registry.remove("brief@2")
        # The bare name has another version to answer with; the version itself has none.
        answer = server.complete(model="brief", n=2).json()
        assert answer["model"] == "brief@1" and len(answer["choices"]) == 2
        assert server.complete(model="brief@2").status_code == 404


def test_overload_is_429_with_retry_after(
    tools: Any, engines: Any, tiny: str, shared_registry: Registry
) -> None:
    engine = engines(tiny, max_rows=1, max_queue=1, max_length=4096)
    with tools.serving(engine, shared_registry, tools.ApiConfig()) as server:
        long = {"model": "tiny", "prompt": "hi", "max_tokens": 4000, "ignore_eos": True}
        with server.http.stream("POST", "/v1/completions", json={**long, "stream": True}) as first:
            pieces = first.iter_raw()
            next(pieces)
            # Two sequences where one has room: none of them stays behind.
            response = server.complete(n=2, temperature=1)
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
            assert error_of(response)["type"] == "rate_limit_error"
            tools.wait_until(lambda: engine.stats().waiting == 0, "the queue is empty")
        assert server.complete().status_code == 200


def test_a_server_that_stops_says_so(
    tools: Any, engines: Any, tiny: str, shared_registry: Registry
) -> None:
    engine = engines(tiny, max_rows=1, max_length=4096)
    with tools.serving(engine, shared_registry, tools.ApiConfig()) as server:
        stream = server.client().completions.create(
            model="tiny", prompt="hi", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        engine.close()
        with pytest.raises(openai.APIError, match="stopping"):
            list(stream)


ASKED = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    "body",
    [
        {f"presence_penalty{i}": 1 for i in range(5000)},
        {"messages": [{"role": "user", "tool_calls": [1] * 5000}]},
        {"messages": [ASKED], "metadata": {str(i): 1 for i in range(5000)}},
        {"messages": [{**ASKED, **{f"field{i}": 1 for i in range(5000)}}]},
    ],
)
def test_a_body_with_thousands_of_problems_gets_a_short_answer(
    server: Any, body: dict[str, Any]
) -> None:
    response = server.http.post("/v1/chat/completions", json={"model": "tiny"} | body)
    assert response.status_code == 400
    assert len(response.json()["error"]["message"]) < 1000
