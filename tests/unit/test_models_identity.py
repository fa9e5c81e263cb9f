"""A model's name, identity and facts; the hub answered by a server of our own."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from safetensors.torch import load_file, save_file

from rayfin import hub as hub_module
from rayfin.config.schema import ModelConfig
from rayfin.errors import ModelError
from rayfin.models import (
    describe_model,
    identity,
    load_base,
    load_tokenizer,
    locate,
    write_tiny,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny(directory)
    return directory


@pytest.fixture(autouse=True)
def _empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_module, "_failure", None)


def point_hub_at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    here = f"http://127.0.0.1:{port}"
    files = f"{here}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """Serves `tiny` as the hub model `someone/tiny`, the way the hub's API does."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/api/models/someone/tiny/tree/"):
                self.answer(json.dumps([self.entry(file) for file in tiny.iterdir()]).encode())
            elif path in ("/api/models/someone/tiny", "/api/models/someone/tiny/revision/main"):
                self.answer(json.dumps({"id": "someone/tiny", "sha": COMMIT}).encode())
            elif path.startswith(f"/someone/tiny/resolve/{COMMIT}/"):
                self.answer((tiny / path.rpartition("/")[2]).read_bytes())
            elif path.startswith("/api/models/someone/tiny/revision/"):
                self.answer(b"{}", 404, "RevisionNotFound")
            else:
                self.answer(b"{}", 404, "RepoNotFound")

        def entry(self, file: Path) -> dict[str, object]:
            oid = hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
            return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": oid}

        def answer(self, body: bytes, status: int = 200, error: str | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", hashlib.sha1(body, usedforsecurity=False).hexdigest())
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    point_hub_at(monkeypatch, server.server_port)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def refused(name: str, **settings: str) -> str:
    with pytest.raises(ModelError) as caught:
        locate(ModelConfig(name=name, **settings))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    return str(caught.value)


def test_bundled_models_are_identified_without_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYFIN_CACHE", str(tmp_path))
    assert identity(ModelConfig(name="tiny")) == "tiny@1"
    assert identity(ModelConfig()) == "smollm2-135m@0.1.2"
    assert not (tmp_path / "models").exists()


def test_a_local_model_is_the_same_wherever_it_lies(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "copy")
    one, copy = ModelConfig(name=str(tiny)), ModelConfig(name=str(tmp_path / "copy"))
    assert identity(one) == identity(copy)
    assert locate(copy) == str(tmp_path / "copy")


@pytest.mark.parametrize("changed", ["a weight", "a setting", "the chat template"])
def test_a_changed_model_is_another(tiny: Path, tmp_path: Path, changed: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    if changed == "a weight":
        tensors = load_file(copy / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"][-1, -1] += 1e-3
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    else:
        name = "config.json" if changed == "a setting" else "chat_template.jinja"
        old, new = ("1e-06", "1e-05") if changed == "a setting" else ("assistant", "model")
        text = (copy / name).read_text()
        assert old in text
        (copy / name).write_text(text.replace(old, new))
    assert identity(ModelConfig(name=str(copy))) != identity(ModelConfig(name=str(tiny)))


def test_facts_come_without_the_weights(tiny: Path, tmp_path: Path) -> None:
    facts = describe_model(ModelConfig(name=str(tiny)))
    model = load_base(ModelConfig(name=str(tiny)), None, "cpu")
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.linear_parameters == sum(
        parameter.numel() for name, parameter in model.named_parameters() if "_proj" in name
    )
    assert facts.architecture == "LlamaForCausalLM"
    assert (facts.hidden_size, facts.num_layers, facts.vocab_size) == (64, 2, 260)
    assert (facts.num_attention_heads, facts.num_key_value_heads, facts.head_dim) == (4, 2, 16)
    assert json.loads(json.dumps(facts.as_dict()))["dtype"] == "float32"


def test_facts_of_an_older_architecture(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=64)
    GPT2LMHeadModel(settings).save_pretrained(tmp_path)
    facts = describe_model(ModelConfig(name=str(tmp_path)))
    assert (facts.intermediate_size, facts.num_key_value_heads, facts.head_dim) == (128, 4, 8)
    assert facts.linear_parameters == 2 * 12 * 32 * 32
    assert facts.max_position_embeddings == 64


@pytest.mark.smollm2
def test_facts_of_smollm2() -> None:
    facts = describe_model(ModelConfig())
    assert facts.parameters == 134_515_008
    assert facts.dtype == "bfloat16"


@pytest.mark.usefixtures("hub")
def test_a_hub_model_is_fetched_and_named_by_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(name="someone/tiny")
    assert locate(config) == "someone/tiny"
    assert identity(config) == f"someone/tiny@{COMMIT}"
    assert describe_model(config).parameters == 90_688
    load_base(config, None, "cpu")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load_base(config, None, "cpu")
    assert len(load_tokenizer(config)) == 260
    assert identity(config) == f"someone/tiny@{COMMIT}"


@pytest.mark.usefixtures("hub")
def test_what_the_hub_does_not_have() -> None:
    assert "no public model of that name" in refused("someone/else")
    assert "no revision 'v9'" in refused("someone/tiny", revision="v9")


def test_offline_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused("gpt2")
    assert "did you mean 'smollm2-135m'?" in refused("smolm2-135m")


def test_a_silent_hub_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_hub_at(monkeypatch, silent.getsockname()[1])
        assert "can't be reached" in refused("someone/tiny")


@pytest.mark.parametrize(
    "name", ["/no/where", "./nowhere", "~/nowhere-at-all", "~nobody-here/x", "a/b/c"]
)
def test_a_path_that_is_not_there(name: str) -> None:
    assert "there is no directory" in refused(name)


@pytest.mark.parametrize("name", ["what is this?", "x" * 5000, "nul\0"])
def test_a_name_that_cannot_be_a_hub_id(name: str) -> None:
    assert "can't be a hub id" in refused(name)


def test_a_revision_is_for_hub_models(tiny: Path) -> None:
    assert "leave it out" in refused(str(tiny), revision="main")
