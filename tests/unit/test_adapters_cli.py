"""`rayfin adapters`, for people and for machines."""

import argparse
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from rayfin.adapters import Registry
from rayfin.cli.adapters import register
from rayfin.errors import AdapterError


def rayfin(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers(required=True))
    args = parser.parse_args(["adapters", *arguments])
    return int(args.handler(args))


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Two versions of `support`, in ./runs of the working directory."""
    monkeypatch.chdir(tmp_path)
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    weights = struct.pack("<Q", len(header)) + header + b"1"
    (trained / "adapter_model.safetensors").write_bytes(weights)
    registry = Registry(tmp_path / "runs" / "adapters")
    for loss in (1.5, 1.25):
        metadata = {"metrics": {"eval_loss": loss}, "spec": {"data": {"path": "[bold]x"}}}
        registry.publish("support", trained, {"base_model": "tiny", **metadata})
    return registry


def test_list_and_show(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert rayfin("list") == 0
    listed = capsys.readouterr().out
    assert "support@1" in listed and "support@2" in listed and "1.25" in listed

    assert rayfin("list", "--json", f"storage={registry.root.parent}") == 0
    value = json.loads(capsys.readouterr().out)
    assert [adapter["ref"] for adapter in value["adapters"]] == ["support@1", "support@2"]
    assert value["problems"] == []

    assert rayfin("show", "support@1") == 0
    shown = capsys.readouterr().out
    assert "spec.data.path" in shown and "[bold]x" in shown and "metrics.eval_loss" in shown
    assert rayfin("show", "support", "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["ref"], value["aliases"], value["versions"]) == ("support@2", ["latest"], [1, 2])


def test_looking_makes_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    there = f"there is no registry of adapters at '{tmp_path}/runs/adapters'; say in which .*add"
    for command in (
        ("list",),
        ("list", "--json"),
        ("verify",),
        ("verify", "support"),
        ("show", "support"),
        ("rollback", "support"),
    ):
        with pytest.raises(AdapterError, match=there):
            rayfin(*command)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_an_empty_registry_says_that_it_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "runs" / "adapters"
    root.mkdir(parents=True)
    assert rayfin("list") == 0
    assert capsys.readouterr().out.startswith(f"the registry at {root} is empty; publish one with")
    assert rayfin("list", "--json") == 0
    assert json.loads(capsys.readouterr().out)["adapters"] == []
    with pytest.raises(AdapterError, match="it is empty"):
        rayfin("rollback", "support")


def test_promote_rollback_unalias_rm(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rayfin("promote", "support@1") == 0
    assert capsys.readouterr().out == "support@prod is now support@1\n"
    assert rayfin("promote", "support", "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["alias"], value["ref"], value["aliases"]) == (
        "prod",
        "support@2",
        ["latest", "prod"],
    )
    assert rayfin("rollback", "support", "--alias", "prod") == 0
    assert registry.resolve("support@prod").version == 1
    with pytest.raises(AdapterError, match="alias 'prod' points to"):
        rayfin("rm", "support@1")
    assert rayfin("unalias", "support", "--alias", "prod") == 0
    capsys.readouterr()
    assert rayfin("rm", "support@2", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"removed": "support@2", "latest": 1}
    assert rayfin("rm", "support@1") == 0
    assert "no version is left" in capsys.readouterr().out


def test_verify(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert rayfin("verify") == 0
    assert capsys.readouterr().out == "support@1: whole\nsupport@2: whole\n"
    weights = registry.root / "support" / "1" / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1])
    assert rayfin("verify", "support", "--json") == 2
    told = json.loads(capsys.readouterr().out)
    assert told["whole"] == ["support@2"] and len(told["problems"]) == 1
    assert rayfin("verify", "support@2") == 0
    assert capsys.readouterr().out == "support@2: whole\n"
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors' is not a whole"):
        rayfin("verify", "support@1")
    with pytest.raises(AdapterError, match=r"adapter 'suport' is not in .* mean 'support'"):
        rayfin("verify", "suport")
    assert rayfin("verify") == 2
    captured = capsys.readouterr()
    assert captured.out == "support@2: whole\n"
    assert "adapter_model.safetensors" in captured.err
    assert rayfin("list") == 0


def test_importing_the_registry_is_light() -> None:
    script = (
        "import sys, rayfin.adapters, rayfin.cli.adapters; "
        "print({'torch', 'peft', 'transformers', 'ray', 'numpy', 'rich'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    assert output.stdout == "set()\n", output.stderr
