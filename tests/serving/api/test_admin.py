"""Loading and unloading over HTTP: off by default, and behind a token of its own."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayfin.adapters import Registry
from rayfin.serving.engine.request import AdapterSource

ADMIN = {"authorization": "Bearer root"}


@pytest.fixture
def server(tools: Any, engine: Any, registry: Registry) -> Iterator[Any]:
    config = tools.ApiConfig.model_validate(
        {"admin_token": "root", "api_keys": [{"key": "user"}], "request_log": None}
    )
    with tools.serving(engine, registry, config) as server:
        server.http.headers["authorization"] = "Bearer user"
        yield server


def load(server: Any, name: Any, path: Any, headers: dict[str, str] = ADMIN) -> Any:
    body = {"lora_name": name, "lora_path": str(path)}
    return server.http.post("/v1/load_lora_adapter", json=body, headers=headers)


def unload(server: Any, name: str, headers: dict[str, str] = ADMIN) -> Any:
    body = {"lora_name": name}
    return server.http.post("/v1/unload_lora_adapter", json=body, headers=headers)


def test_a_loaded_adapter_answers_and_an_unloaded_one_is_gone(
    server: Any, registry: Registry, tiny_adapters: dict[str, AdapterSource]
) -> None:
    path = tiny_adapters["ia3"].path
    assert server.complete(model="fresh").status_code == 404
    assert load(server, "fresh", path).json() == {"lora_name": "fresh@1"}
    assert server.complete(model="fresh").json()["model"] == "fresh@1"
    assert load(server, "fresh", path).json() == {"lora_name": "fresh@2"}
    registry.promote("fresh", 1)
    assert unload(server, "fresh").json() == {"removed": ["fresh@1", "fresh@2"]}
    assert unload(server, "fresh").status_code == 404
    assert "fresh" not in registry.names()
    # Others are as they were.
    assert server.complete(model="support@prod").json()["model"] == "support@1"


def test_one_version_is_unloaded_unless_an_alias_points_to_it(
    server: Any, registry: Registry
) -> None:
    kept = unload(server, "support@1")
    assert kept.status_code == 409
    assert kept.json()["error"]["code"] == "in_use"
    assert unload(server, "support@9").status_code == 404
    assert unload(server, "support@2").json() == {"removed": ["support@2"]}
    assert registry.versions("support") == (1,)
    assert unload(server, "tiny").status_code == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 403),  # the client's own key
        ({"authorization": ""}, 401),
        ({"authorization": "Bearer wrong"}, 403),
        ({"authorization": "Basic root"}, 401),
    ],
)
def test_only_the_token_opens_it(
    server: Any, registry: Registry, headers: dict[str, str], status: int
) -> None:
    source = registry.root / "sales" / "1"
    assert load(server, "mine", source, headers).status_code == status
    assert unload(server, "sales", headers).status_code == status
    assert registry.names() == ("sales", "support")


def test_the_token_is_no_api_key(server: Any) -> None:
    assert server.http.get("/v1/models", headers=ADMIN).status_code == 401


@pytest.mark.parametrize("name", ["../x", "a/b", "", "x@1", "x" * 65, ".x", "tiny:x", "x\0"])
def test_names_that_no_adapter_can_have_are_400(server: Any, registry: Registry, name: str) -> None:
    response = load(server, name, registry.root / "sales" / "1")
    assert response.status_code == 400
    assert registry.names() == ("sales", "support")


def test_what_cannot_be_served_is_not_published(
    server: Any, registry: Registry, tmp_path: Path
) -> None:
    good = registry.root / "support" / "1"

    def damaged(name: str) -> Path:
        directory = tmp_path / name
        shutil.copytree(good, directory)
        (directory / "adapter_model.safetensors").chmod(0o644)
        (directory / "adapter_config.json").chmod(0o644)
        return directory

    pickled = damaged("pickled")
    (pickled / "adapter_model.safetensors").write_bytes(b"\x80\x04K\x01.")
    bare = damaged("bare")
    (bare / "adapter_model.safetensors").unlink()
    other_base = damaged("other-base")
    config = json.loads((other_base / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "another/base"
    config["r"] = 10**6
    (other_base / "adapter_config.json").write_text(json.dumps(config))
    linked = damaged("linked")
    (linked / "adapter_config.json").unlink()
    (linked / "adapter_config.json").symlink_to(good / "adapter_config.json")
    for path in (pickled, bare, other_base, linked, tmp_path / "missing", "/", "\0", "a" * 5000):
        response = load(server, "bad", path)
        assert response.status_code == 400, (path, response.text)
        assert response.json()["error"]["code"] == "adapter_error"
    assert registry.names() == ("sales", "support")
