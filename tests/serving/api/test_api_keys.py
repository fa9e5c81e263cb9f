"""API keys: who may ask, for which adapters, and how often."""

import ast
import contextlib
import hmac
import inspect
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from pydantic import ValidationError

from rayfin.config.serving import ApiConfig
from rayfin.serving.api import api_keys
from rayfin.serving.api.api_keys import ApiKeys
from rayfin.serving.api.errors import ApiError


@pytest.fixture(scope="module")
def guarded(tools: Any, engine: Any, shared_registry: Any) -> Any:
    config = ApiConfig.model_validate(
        {
            "api_keys": [
                {"key": "all"},
                {"key": "sales-only", "adapters": ["sales"]},
                {"key": "base-too", "adapters": ["sales", "tiny"]},
                {"key": "twice", "requests_per_minute": 2},
                {"key": "near", "adapters": ["suport"]},
            ],
            "admin_token": "root",
        }
    )
    with tools.serving(engine, shared_registry, config) as server:
        yield server


def may(server: Any, key: str, model: str) -> bool:
    body = {"model": model, "prompt": "hi", "max_tokens": 1}
    headers = {"authorization": f"Bearer {key}"}
    response = server.http.post("/v1/completions", json=body, headers=headers)
    assert response.status_code in (200, 403)
    return bool(response.status_code == 200)


@pytest.mark.parametrize("key", ["wrong", "al", "all ", "ALL", "", "root", "âll"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/sales"])
def test_without_a_key_there_is_nothing_to_see(guarded: Any, key: str, path: str) -> None:
    for value in (f"Bearer {key}", f"Basic {key}", key):
        headers = {"authorization": value.strip().encode("latin-1")}
        response = guarded.http.get(path, headers=headers)
        if value == "Bearer all ":  # HTTP ignores the space around a value
            assert response.status_code == 200
            continue
        assert response.status_code == 401
        assert response.json()["error"]["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_a_request_without_a_key_is_refused_unread(guarded: Any, path: str) -> None:
    assert guarded.http.post(path, content=b"not even JSON").status_code == 401


LIMITED = (None, "wrong", "sales-only", "base-too")


@pytest.mark.parametrize("key", [*LIMITED, "all", "root"])
def test_what_names_all_adapters_is_for_the_operator_and_for_keys_to_all(
    guarded: Any, key: str | None
) -> None:
    assert may(guarded, "all", "support")  # so that there is a name to be seen
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    health, metrics = (guarded.http.get(p, headers=headers) for p in ("/health", "/metrics"))
    assert health.status_code == 200
    assert health.json()["status"] == "ok" and "running" in health.json()
    if key in LIMITED:
        assert metrics.status_code == 401 and "admin token" in metrics.json()["error"]["message"]
        assert "support" not in health.text + metrics.text
    else:
        assert metrics.status_code == 200 and 'adapter="support"' in metrics.text
        assert "support@2" in health.json()["resident"]


def test_looking_at_the_metrics_takes_nothing_of_an_allowance() -> None:
    config = ApiConfig.model_validate({"api_keys": [{"key": "k", "requests_per_minute": 1}]})
    keys = ApiKeys(config, lambda: 0.0)
    request: Any = SimpleNamespace(headers={"authorization": "Bearer k"})
    assert keys.may_see_all(request) and keys.may_see_all(request)
    assert keys.admit(request) is not None


def test_a_key_reaches_its_adapters_only(guarded: Any) -> None:
    models = ("sales", "sales@1", "tiny:sales@latest", "support", "support@1", "tiny")
    reached = {key: [m for m in models if may(guarded, key, m)] for key in KEYS}
    assert reached == {
        "all": list(models),
        "sales-only": ["sales", "sales@1", "tiny:sales@latest"],
        "base-too": ["sales", "sales@1", "tiny:sales@latest", "tiny"],
    }


KEYS = ("all", "sales-only", "base-too")


def test_a_key_sees_its_adapters_only(guarded: Any) -> None:
    seen = {key: {m.id for m in guarded.client(key).models.list()} for key in KEYS}
    assert seen["sales-only"] == {"sales", "sales@1"}
    assert seen["base-too"] == {"sales", "sales@1", "tiny"}
    assert {"support", "tiny"} < seen["all"]


@pytest.mark.parametrize("model", ["support", "support@1", "support@prod", "tiny:support", "tiny"])
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/completions", {"prompt": "hi", "max_tokens": 1}),
        ("POST", "/v1/completions", {"prompt": "hi", "max_tokens": 1, "stream": True}),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("POST", "/tokenize", {"prompt": "hi"}),
        ("POST", "/tokenize", {"messages": [{"role": "user", "content": "hi"}]}),
        ("GET", "/v1/models/", None),
    ],
    ids=lambda value: str(value)[:24],
)
def test_no_route_takes_a_key_to_anothers_adapter(
    guarded: Any, method: str, path: str, body: dict[str, Any] | None, model: str
) -> None:
    before = guarded.engine.stats().prompt_tokens
    answers = []
    for name in (model, "missing"):
        told = {"url": path + (name if body is None else "")}
        if body is not None:
            told["json"] = body | {"model": name}
        response = guarded.http.request(
            method, **told, headers={"authorization": "Bearer sales-only"}
        )
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "model_not_allowed"
        named = name.removeprefix("tiny:").partition("@")[0]
        answers.append(response.text.replace(named, "NAME"))
    assert answers[0] == answers[1], "what exists and what doesn't look the same"
    assert guarded.engine.stats().prompt_tokens == before, "nothing of it was computed"


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
@pytest.mark.parametrize("key", [None, "all", "sales-only"])
def test_no_api_key_changes_the_registry(guarded: Any, path: str, key: str | None) -> None:
    body = {"lora_name": "sales", "lora_path": "/"}
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    response = guarded.http.post(path, json=body, headers=headers)
    assert response.status_code == (401 if key is None else 403)
    assert guarded.registry.versions("sales")


@pytest.mark.parametrize("given", ["all", "al", "", "x" * 10_000, "root", "twice"])
def test_every_secret_is_compared_whole_and_in_constant_time(
    monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    """By construction: digests of one length, hmac.compare_digest, every key, whichever fits."""
    config = ApiConfig.model_validate(
        {"api_keys": [{"key": "all"}, {"key": "twice"}, {"key": "three"}], "admin_token": "root"}
    )
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return compare_digest(one, other)

    compare_digest = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys = ApiKeys(config)
    request: Any = SimpleNamespace(headers={"authorization": f"Bearer {given}"})
    with contextlib.suppress(ApiError):
        keys.admit(request)
    assert len(compared) == 3
    with contextlib.suppress(ApiError):
        keys.admit_admin(request)
    assert len(compared) == (4 if given else 3)
    assert {len(secret) for pair in compared for secret in pair} == {32}
    # Nothing else looks at a secret.
    source = ast.parse(inspect.getsource(api_keys))
    for node in ast.walk(source):
        if isinstance(node, ast.Compare) and any(isinstance(o, ast.Eq) for o in node.ops):
            assert "scheme" in ast.unparse(node), ast.unparse(node)


def test_a_key_learns_nothing_of_other_adapters(guarded: Any) -> None:
    client = guarded.client("sales-only")
    answers = []
    for model in ("support", "missing"):
        with pytest.raises(openai.PermissionDeniedError) as refused:
            client.models.retrieve(model)
        answers.append(refused.value.message.replace(model, "NAME"))
    assert answers[0] == answers[1]
    with pytest.raises(openai.NotFoundError) as missing:
        guarded.client("near").models.retrieve("suport")
    assert "support" not in missing.value.message


def test_a_limit_is_429_with_retry_after(guarded: Any) -> None:
    client = guarded.client("twice")
    client.models.list()
    client.models.list()
    with pytest.raises(openai.RateLimitError) as refused:
        client.models.list()
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 30
    assert refused.value.code == "rate_limit_exceeded"
    guarded.client("all").models.list()


LONG = {"model": "tiny", "prompt": "hi", "max_tokens": 400, "ignore_eos": True, "stream": True}


def test_a_key_has_so_many_requests_at_a_time(
    tools: Any, engine: Any, shared_registry: Any
) -> None:
    config = ApiConfig.model_validate(
        {"api_keys": [{"key": "few", "max_concurrent_requests": 2}, {"key": "any"}]}
    )
    with tools.serving(engine, shared_registry, config) as server:

        def ask(key: str, **more: Any) -> Any:
            headers = {"authorization": f"Bearer {key}"}
            request = server.http.build_request(
                "POST", "/v1/completions", json=LONG | more, headers=headers
            )
            return server.http.send(request, stream=True)

        streams = [ask("few"), ask("few")]
        assert [stream.status_code for stream in streams] == [200, 200]
        refused = ask("few", max_tokens=1)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert "2 requests at a time" in refused.read().decode()
        assert ask("any", max_tokens=1).status_code == 200
        assert server.http.get("/health").status_code == 200
        for stream in streams:
            stream.close()
        tools.wait_until(lambda: ask("few", max_tokens=1).read() and True, "it is answered")
        tools.wait_until(lambda: ask("few", max_tokens=1).status_code == 200, "places are free")


def test_an_allowance_comes_back_with_time() -> None:
    now = 0.0
    config = ApiConfig.model_validate({"api_keys": [{"key": "k", "requests_per_minute": 30}]})
    keys = ApiKeys(config, lambda: now)
    request: Any = SimpleNamespace(headers={"authorization": "Bearer k"})

    def admitted(times: int) -> int:
        """How many of so many requests go on before one is refused."""
        for count in range(times):
            try:
                keys.admit(request)
            except ApiError:
                return count
        return times

    assert admitted(100) == 30
    now = 1.0
    assert admitted(10) == 0
    now = 4.0
    assert admitted(10) == 2
    now = 10_000.0
    assert admitted(100) == 30


def test_the_same_key_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="twice"):
        ApiConfig.model_validate({"api_keys": [{"key": "a"}, {"key": "a"}]})
    with pytest.raises(ValidationError, match="admin_token"):
        ApiConfig.model_validate({"api_keys": [{"key": "a"}], "admin_token": "a"})


def test_secrets_are_not_shown() -> None:
    config = ApiConfig.model_validate({"api_keys": [{"key": "s3cret"}], "admin_token": "t0ken"})
    assert "s3cret" not in repr(config) and "t0ken" not in repr(config)
