"""An adapter answers over the base that it was trained on, and over no other of the same shape."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rayfin.adapters import Registry
from rayfin.cli.serve import _print
from rayfin.config import load_serve_config
from rayfin.config.schema import ModelConfig
from rayfin.errors import AdapterError
from rayfin.models import base_of, locate, meta_model
from rayfin.serving import compatibility
from rayfin.serving.compatibility import served_names
from rayfin.serving.engine.engine import Engine
from rayfin.serving.engine.layout import linears_of
from rayfin.serving.engine.request import AdapterSource
from rayfin.serving.engine.vllm_backend import check_lora


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two full fine-tunes of one shape, each the first version of its name."""
    root = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("t-full", "u-full")):
        directory = root / name / "1"
        shutil.copytree(locate(ModelConfig(name="tiny")), directory)
        weights = {
            key: one + number for key, one in load_file(directory / "model.safetensors").items()
        }
        save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return {name: str(root / name / "1") for name in ("t-full", "u-full")}


def checks(model: str, engine: Engine) -> dict[str, Callable[[AdapterSource], Any]]:
    """The native engine's and vLLM's."""
    config = ModelConfig(name=model)
    base, linears = base_of(config), linears_of(meta_model(config))
    return {
        "native": engine.check,
        "vllm": lambda source: check_lora(source, base, linears, 64),
    }


@pytest.mark.parametrize("kind", ["native", "vllm"])
def test_an_equal_last_component_is_no_base(
    lab: Any, bases: dict[str, str], engines: Any, tmp_path: Path, kind: str
) -> None:
    served = bases["t-full"]
    check = checks(served, engines(served, max_length=64))[kind]
    registry = Registry(tmp_path / "adapters")
    for name, base in bases.items():
        strangers = lab.make_adapter(tmp_path / name, base, lab.METHODS["lora"], 0)
        told = {
            "base_model": base,
            "base_identity": list(base_of(ModelConfig(name=base)).identities),
        }
        ours = registry.publish(name, strangers.path, told)
        for source in (strangers, AdapterSource(ours.ref, ours.path)):
            if base == served:
                check(source)
                continue
            message = (
                f"trained on .*u-full/1.*the served base is '{served}' .local@.*--base-is-right"
            )
            with pytest.raises(AdapterError, match=message):
                check(source)

    # By its content it is known wherever it lies, and under its old path another model isn't.
    moved = tmp_path / "elsewhere"
    shutil.copytree(bases["u-full"], moved)
    ours = registry.resolve("u-full")
    checks(str(moved), engines(str(moved), max_length=64))[kind](AdapterSource(ours.ref, ours.path))


def test_what_lies_under_a_base_s_path_now_is_another_model(
    lab: Any, bases: dict[str, str], engines: Any, tmp_path: Path
) -> None:
    path = tmp_path / "base"
    shutil.copytree(bases["t-full"], path)
    known = base_of(ModelConfig(name=str(path)))
    strangers = lab.make_adapter(tmp_path / "lora", str(path), lab.METHODS["lora"], 0)
    told = {"base_model": str(path), "base_identity": list(known.identities)}
    ours = Registry(tmp_path / "adapters").publish("ours", strangers.path, told)
    shutil.rmtree(path)
    shutil.copytree(bases["u-full"], path)
    engine = engines(str(path), max_length=64)
    with pytest.raises(AdapterError, match=f"trained on '{path}' .local@.*served base is '{path}'"):
        engine.check(AdapterSource(ours.ref, ours.path))


def test_a_record_beside_other_files_is_not_believed(
    lab: Any, bases: dict[str, str], engines: Any, tmp_path: Path
) -> None:
    """A rayfin.json that was copied along with a stranger's weights."""
    mine = lab.make_adapter(tmp_path / "mine", bases["t-full"], lab.METHODS["lora"], 0)
    theirs = lab.make_adapter(tmp_path / "theirs", bases["u-full"], lab.METHODS["rslora"], 1)
    told = {"base_identity": list(base_of(ModelConfig(name=bases["t-full"])).identities)}
    version = Registry(tmp_path / "adapters").publish("mine", mine.path, told)
    shutil.copy(version.path / "rayfin.json", theirs.path)
    engine = engines(bases["t-full"], max_length=64)
    with pytest.raises(AdapterError, match=r"trained on .*u-full/1"):
        engine.check(theirs)
    assert json.loads((theirs.path / "rayfin.json").read_text())["base_identity"]


def test_what_the_base_refuses_is_counted_and_not_listed(
    lab: Any,
    bases: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    served = bases["t-full"]
    registry = Registry(tmp_path / "adapters")

    def publish(name: str, base: str, **changes: Any) -> None:
        strangers = lab.make_adapter(tmp_path / name, base, lab.METHODS["lora"], 0).path
        config = strangers / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
        registry.publish(name, strangers)

    publish("mine", served)
    for name in ("a", "b", "c", "d"):
        publish(name, bases["u-full"])
    publish("hada", served, peft_type="LOHA")
    publish("large", served, r=128)
    registry.publish("whole", served)
    settings = [f"model.name={served}", f"storage={tmp_path}"]
    config = load_serve_config(None, settings)
    names = served_names(config, registry)
    listing = names.list()
    assert [named.answer_name for named in listing.served] == ["mine@1"]
    for name in ("a", "hada", "large", "whole"):
        with pytest.raises(AdapterError) as refused:
            names.resolve(name)
        (why,) = [told for version, told in listing.refused.items() if version.name == name]
        assert str(refused.value) == str(why.error)
    where = SimpleNamespace(cpus=1.0, gpus=0.0, notes=())  # importing Placement imports Ray Serve
    deployed: Any = SimpleNamespace(url="http://here", config=config, placement=where)
    _print(deployed, listing, 1, as_json=False)
    out = capsys.readouterr().out
    assert out.startswith("Serving t-full and 1 adapter at http://here\n  mine@1 ")
    assert (
        "Not served: 4 of another base (a@1, b@1, c@1, …), 1 of a type that the engine does not "
        "serve (hada@1), 1 of a rank above engine.max_rank (large@1), 1 fully fine-tuned, "
        "and so bases of their own (whole@1), 1 unreadable; see: rayfin adapters list "
        f"storage={tmp_path}\n"
    ) in out
    _print(deployed, listing, 0, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert [one["ref"] for one in told["adapters"]] == ["mine@1"]
    assert set(told["not_served"]) == {
        f"{n}@1" for n in ("a", "b", "c", "d", "hada", "large", "whole")
    }
    # The base itself may lie in the registry.
    config = load_serve_config(None, [f"model.name={registry.root}/whole/1", *settings[1:]])
    refused_then = served_names(config, registry).list().refused
    assert "whole@1" not in {version.ref for version in refused_then}
    # What was found to fit is not read again.
    monkeypatch.setattr(
        compatibility, "read_settings", lambda source: pytest.fail(f"{source.ref} was read")
    )
    assert names.resolve("mine").answer_name == "mine@1"
