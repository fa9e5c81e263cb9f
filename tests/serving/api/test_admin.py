"""Loading and unloading over HTTP: off by default, and behind a token of its own."""

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rayfin.adapters import Registry
from rayfin.adapters.served_catalog import ServedCatalog
from rayfin.cli import main
from rayfin.config.schema import ModelConfig
from rayfin.models import base_of
from rayfin.serving.api import admin
from rayfin.serving.engine.request import AdapterSource

ADMIN = {"authorization": "Bearer root"}


@pytest.fixture
def server(tools: Any, engine: Any, registry: Registry) -> Iterator[Any]:
    config = tools.ApiConfig.model_validate(
        {"admin_token": "root", "api_keys": [{"key": "user"}], "request_log": None}
    )
    with tools.serving(engine, ServedCatalog(registry.root), config) as server:
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
    told = load(server, "fresh", path).json()
    assert told == {
        "lora_name": "fresh@1",
        "is_new": True,
        "notes": ["left out, as no part of an adapter: README.md"],
    }
    assert server.complete(model="fresh").json()["model"] == "fresh@1"
    told = load(server, "fresh", path).json()
    assert (told["lora_name"], told["is_new"]) == ("fresh@1", False)
    assert "already there as fresh@1 (same content); no version was made" in told["notes"]
    assert load(server, "fresh", tiny_adapters["lora"].path).json()["lora_name"] == "fresh@2"
    registry.promote("fresh", 1)
    assert unload(server, "fresh").json() == {"removed": ["fresh@1", "fresh@2"]}
    gone = unload(server, "fresh")
    assert gone.status_code == 404 and gone.json()["error"]["param"] == "lora_name"
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


def test_a_version_that_cannot_answer_is_unloaded_all_the_same(
    server: Any, registry: Registry
) -> None:
    path = registry.resolve("support@1").path
    foreign = {"base_model": "/data/llama", "base_identity": ["local@0123456789abcdef"]}
    registry.publish("mixed", path)
    registry.publish("mixed", path, foreign)
    damaged = registry.publish("mixed", path)
    (damaged.path / "rayfin.json").write_text("{")
    for ref in ("mixed@2", "mixed@3"):
        assert server.complete(model=ref).status_code == 400
        assert unload(server, ref).json() == {"removed": [ref]}
    assert registry.versions("mixed") == (1,)


def test_nobody_waits_without_an_end_for_a_load_that_hangs(
    server: Any, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, leave = threading.Event(), threading.Event()
    add_adapter = admin.add_adapter

    def hang(*arguments: Any, **options: Any) -> Any:
        entered.set()
        assert leave.wait(540)
        return add_adapter(*arguments, **options)

    monkeypatch.setattr(admin, "add_adapter", hang)
    with ThreadPoolExecutor(1) as pool:
        path = registry.resolve("support@1").path
        loading = pool.submit(load, server, "fresh", path)
        try:
            assert entered.wait(540)
            monkeypatch.setattr(admin, "_TURN_SECONDS", 0.05)
            for response in (unload(server, "sales"), load(server, "other", path)):
                assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
                assert response.json()["error"]["code"] == "unavailable"
            monkeypatch.setattr(admin, "_TURN_SECONDS", 60.0)
        finally:
            leave.set()
        assert loading.result().json()["lora_name"] == "fresh@1"
    assert unload(server, "sales").json()["removed"]


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


@pytest.mark.parametrize(
    "name", ["tiny", "../x", "a/b", "", "x@1", "x" * 65, ".x", "tiny:x", "x\0"]
)
def test_names_that_no_adapter_can_have_are_400(server: Any, registry: Registry, name: str) -> None:
    response = load(server, name, registry.root / "sales" / "1")
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "lora_name" and repr(name[:9])[:-1] in error["message"]
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
    base_change_warning = damaged("other-base")
    config = json.loads((base_change_warning / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "another/base"
    config["r"] = 10**6
    (base_change_warning / "adapter_config.json").write_text(json.dumps(config))
    linked = damaged("linked")
    (linked / "adapter_config.json").unlink()
    (linked / "adapter_config.json").symlink_to(good / "adapter_config.json")
    for path in (
        pickled,
        bare,
        base_change_warning,
        linked,
        tmp_path / "missing",
        "/",
        "/a" * 2500,
    ):
        response = load(server, "bad", path)
        assert response.status_code == 400, (path, response.text)
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("adapter_error", "lora_path")
        assert str(tmp_path) not in response.text and "rayfin " not in error["message"]
    for path in ("runs/lora", "./lora", "~/lora", "\0", "/\0", "a" * 5000):
        assert load(server, "bad", path).status_code == 400, path
    assert registry.names() == ("sales", "support")


def test_what_is_recorded_is_what_the_command_records(
    server: Any,
    registry: Registry,
    tiny: str,
    tiny_adapters: dict[str, AdapterSource],
    tmp_path: Path,
) -> None:
    """So that the adapter stays one of this base wherever that lies."""
    path = tiny_adapters["lora"].path
    assert load(server, "fresh", path).status_code == 200
    other = f"storage={tmp_path}/other"
    assert main(["adapters", "add", str(path), "fresh", other, f"model.name={tiny}"]) == 0
    ours, theirs = (
        dict(one.resolve("fresh").metadata)
        for one in (registry, Registry(tmp_path / "other" / "adapters"))
    )
    assert ours.pop("created_at") and theirs.pop("created_at") and ours == theirs
    moved = tmp_path / "elsewhere" / "base"
    shutil.copytree(tiny, moved)
    base = registry.resolve("fresh").base
    assert base is not None and base.is_same(base_of(ModelConfig(name=str(moved))))


def test_the_administrator_may_answer_for_the_base(
    server: Any,
    registry: Registry,
    tiny: str,
    tiny_adapters: dict[str, AdapterSource],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(tiny_adapters["lora"].path, theirs)
    config = theirs / "adapter_config.json"
    named = json.loads(config.read_text()) | {"base_model_name_or_path": "/data/models/llama/3"}
    config.write_text(json.dumps(named))
    for _ in range(2):
        refused = load(server, "theirs", theirs)
        assert refused.status_code == 400
        message = refused.json()["error"]["message"]
        assert "trained on 'llama', and the served base is 'tiny' (local@" in message
        assert '"base_is_right": true' in message
        assert "/data" not in message and tiny not in message and "rayfin " not in message
    (logged,) = [one.getMessage() for one in caplog.records if "theirs" in one.getMessage()]
    assert f"'/data/models/llama/3', and the served base is '{tiny}'" in logged
    assert f"rayfin adapters add DIR NAME --base-is-right model.name={tiny}" in logged
    body = {"lora_name": "theirs", "lora_path": str(theirs), "base_is_right": True}
    loaded = server.http.post("/v1/load_lora_adapter", json=body, headers=ADMIN)
    assert loaded.json()["lora_name"] == "theirs@1"
    told = registry.resolve("theirs").metadata
    assert told["base_identity"] == list(base_of(ModelConfig(name=tiny)).identities)
    assert server.complete(model="theirs").json()["model"] == "theirs@1"


def test_a_name_that_had_another_base_is_told_of_without_paths(
    server: Any, registry: Registry, tiny_adapters: dict[str, AdapterSource]
) -> None:
    path = tiny_adapters["lora"].path
    told = {"base_model": "/data/llama", "base_identity": ["local@0123456789abcdef"]}
    registry.publish("mixed", path, told)
    (_, note) = load(server, "mixed", path).json()["notes"]
    assert note.startswith("'mixed' is mixed@2 from now on, whose base is 'tiny' (local@")
    assert "mixed@1 has 'llama' (local@0123456789abcdef)" in note
    assert "/" not in note and "rayfin " not in note


def test_a_registry_that_is_away_is_not_begun_anew(
    server: Any, registry: Registry, tiny_adapters: dict[str, AdapterSource], tmp_path: Path
) -> None:
    registry.root.rename(tmp_path / "elsewhere")
    for response in (load(server, "fresh", tiny_adapters["lora"].path), unload(server, "sales")):
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "unavailable"
    assert not registry.root.exists()


def test_the_guide_s_commands_answer_what_it_shows(
    tools: Any,
    engine: Any,
    tiny_adapters: dict[str, AdapterSource],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lora = tmp_path / "lora"
    shutil.copytree(tiny_adapters["lora"].path, lora)
    config = lora / "adapter_config.json"
    named = json.loads(config.read_text())
    config.write_text(json.dumps(named | {"base_model_name_or_path": "/data/models/llama"}))
    shutil.make_archive(str(tmp_path / "theirs"), "zip", lora)
    config.write_text(json.dumps(named))
    (lora / "README.md").unlink()
    catalog = ServedCatalog(tmp_path / "empty")
    catalog.make()
    monkeypatch.setenv("ADMIN_TOKEN", "root")
    with tools.serving(engine, catalog, tools.ApiConfig(admin_token="root")) as server:
        for program, arguments, shown in tools.guide("Loading and unloading adapters over HTTP"):
            assert program == "curl"
            given = [argument.replace("/srv/", f"{tmp_path}/") for argument in arguments]
            tools.assert_shown(server.curl(given), shown)
