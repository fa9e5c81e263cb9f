"""The registry: what is published stays as it is, and an alias is where it was put."""

import json
import struct
from pathlib import Path

import pytest

from rayfin.adapters import LATEST, AdapterRef, Registry
from rayfin.errors import AdapterError, StorageError, UsageError


def write_safetensors(path: Path, seed: int = 0) -> None:
    header = json.dumps(
        {"lora_A.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<4f", *[seed] * 4))


def files_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A trained adapter beside things that must not be published."""
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "tiny", "r": 4})
    )
    write_safetensors(trained / "adapter_model.safetensors")
    (trained / "tokenizer.json").write_text("{}")
    (trained / "tokenizer_config.json").write_text("{}")
    (trained / "chat_template.jinja").write_text("{{ messages }}")
    for stray in (
        "optimizer.pt",
        "tokenizer.pkl",
        "training_args.bin",
        "README.md",
        ".hidden",
    ):
        (trained / stray).write_text("stray")
    return trained


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "adapters")


def test_publish_copies_the_adapter_and_nothing_else(registry: Registry, source: Path) -> None:
    spec = {"method": {"type": "lora", "r": 4}, "name": "not this one"}
    version = registry.publish("support", source, {**spec, "trial_id": "t1"}, alias="prod")

    assert (version.ref, version.peft_type, version.base_model) == ("support@1", "LORA", "tiny")
    assert version.aliases == (LATEST, "prod")
    assert version.path == registry.root / "support" / "1"
    assert files_in(version.path) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "rayfin.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert version.metadata["trial_id"] == "t1"
    assert version.metadata["name"] == "support"
    assert version.metadata["created_at"].endswith("+00:00")
    assert version.metadata["files"]["tokenizer.json"]["bytes"] == 2
    assert registry.verify("support@prod") == version
    assert json.loads((registry.root / "support" / "aliases.json").read_text()) == {
        "aliases": {"latest": 1, "prod": 1},
        "history": {},
        "newest": 1,
    }


def test_a_published_version_does_not_follow_its_source(registry: Registry, source: Path) -> None:
    first = registry.publish("support", source, {})
    before = {path.name: path.read_bytes() for path in first.path.iterdir()}
    write_safetensors(source / "adapter_model.safetensors", seed=7)
    second = registry.publish("support", source, {})

    assert {path.name: path.read_bytes() for path in first.path.iterdir()} == before
    assert all(not path.stat().st_mode & 0o222 for path in first.path.iterdir())
    weights = "adapter_model.safetensors"
    assert (second.path / weights).read_bytes() == (source / weights).read_bytes()


def test_a_full_fine_tune_is_published_with_its_shards(registry: Registry, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "generation_config.json").write_text("{}")
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for shard in shards:
        write_safetensors(model / shard)
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}))

    version = registry.publish("whole", model, {"base_model": "tiny"})
    assert (version.peft_type, version.base_model) == ("FULL", "tiny")
    assert set(shards) < set(files_in(version.path))
    registry.verify("whole")

    (model / shards[1]).unlink()
    with pytest.raises(AdapterError, match="has no model-00002"):
        registry.publish("whole", model, {})
    index.write_text(json.dumps({"weight_map": {"a": "../model-x.safetensors"}}))
    with pytest.raises(AdapterError, match=r"not a model-\*.safetensors beside it"):
        registry.publish("whole", model, {})


def test_references() -> None:
    assert AdapterRef.parse("a@3") == AdapterRef("a", version=3)
    assert AdapterRef.parse("a@prod") == AdapterRef("a", alias="prod")
    assert AdapterRef.parse("a") == AdapterRef("a")
    for text in ("a", "a@3", "a@prod", "A.b_c-1@latest"):
        assert str(AdapterRef.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "@", "a@", "@3", "a@0", "a@03", "a@³", "a@" + "9" * 5000, "a@b@c", "a@../b", "a@-1"),
        *("../a", "/a", "a/b", "a\\b", "..", ".hidden", "a\n", "a b", "ä", "a" * 65, "a@Latest"),
    ],
)
def test_malformed_references_are_refused(registry: Registry, text: str) -> None:
    with pytest.raises(AdapterError):
        AdapterRef.parse(text)
    with pytest.raises(AdapterError):
        registry.resolve(text)


def test_resolve_and_listings(registry: Registry, source: Path) -> None:
    assert registry.names() == () and registry.list() == () and not registry.root.exists()
    for _ in range(3):
        registry.publish("support", source, {})
    registry.publish("billing", source, {})
    registry.promote("support", 2)

    assert registry.names() == ("billing", "support")
    assert registry.versions("support") == (1, 2, 3)
    assert registry.versions("nobody") == ()
    assert registry.aliases("support") == {"latest": 3, "prod": 2}
    assert registry.resolve("support").version == 3
    assert registry.resolve("support@latest").version == 3
    assert registry.resolve(AdapterRef("support", alias="prod")).aliases == ("prod",)
    assert [version.ref for version in registry.list()] == [
        "billing@1",
        "support@1",
        "support@2",
        "support@3",
    ]
    with pytest.raises(AdapterError, match="versions of 'support': 1, 2, 3"):
        registry.resolve("support@9")
    with pytest.raises(AdapterError, match=r"did you mean 'support'\?\); adapters: billing"):
        registry.resolve("suport")
    with pytest.raises(AdapterError, match=r"no alias 'prd' \(did you mean 'prod'\?\)"):
        registry.resolve("support@prd")


def test_promote_and_rollback_walk_back_through_what_was(registry: Registry, source: Path) -> None:
    for _ in range(4):
        registry.publish("support", source, {})
    for version in (1, 3, 3, 2):
        registry.promote("support", version)
    assert registry.rollback("support").version == 3
    registry.promote("support", "latest")
    assert [registry.rollback("support").version for _ in range(2)] == [3, 1]
    with pytest.raises(AdapterError, match="no earlier target than version 1"):
        registry.rollback("support")
    assert registry.aliases("support")["prod"] == 1

    registry.promote("support", "support@2", alias="staging")
    registry.promote("support", AdapterRef("support", alias="staging"))
    assert registry.aliases("support") == {"latest": 4, "prod": 2, "staging": 2}


def test_rollback_says_so_when_the_earlier_version_was_removed(
    registry: Registry, source: Path
) -> None:
    registry.publish("support", source, {}, alias="prod")
    registry.publish("support", source, {}, alias="prod")
    registry.remove("support@1")
    with pytest.raises(AdapterError, match="can't go back to version 1, which was removed"):
        registry.rollback("support")
    assert registry.aliases("support") == {"latest": 2, "prod": 2}


def test_remove(registry: Registry, source: Path) -> None:
    for _ in range(3):
        registry.publish("support", source, {})
    registry.promote("support", 2)
    with pytest.raises(AdapterError, match=r"alias 'prod' points to; .* adapters promote"):
        registry.remove("support@2")
    with pytest.raises(AdapterError, match="names no version"):
        registry.remove("support")

    assert str(registry.remove("support@3")) == "support@3"
    assert registry.resolve("support").version == 2
    assert json.loads((registry.root / "support/aliases.json").read_text())["aliases"] == {
        "latest": 2,
        "prod": 2,
    }
    assert registry.publish("support", source, {}).version == 4
    registry.unalias("support", "prod")
    for version in (1, 2, 4):
        registry.remove(AdapterRef("support", version))
    assert registry.names() == ()
    with pytest.raises(AdapterError, match="it is empty"):
        registry.resolve("support")
    assert registry.publish("support", source, {}).version == 5


@pytest.mark.parametrize("alias", ["7", "../x", "", "a b", "LATEST", "latest"])
def test_aliases_that_can_not_be_moved(registry: Registry, source: Path, alias: str) -> None:
    registry.publish("support", source, {})
    for act in (
        lambda: registry.promote("support", 1, alias),
        lambda: registry.rollback("support", alias),
        lambda: registry.unalias("support", alias),
    ):
        with pytest.raises(AdapterError, match="alias"):
            act()
    if alias != LATEST:
        with pytest.raises(AdapterError, match="alias"):
            registry.publish("support", source, {}, alias=alias)
    assert registry.aliases("support") == {LATEST: 1}


def test_promote_stays_within_one_adapter(registry: Registry, source: Path) -> None:
    registry.publish("support", source, {})
    registry.publish("billing", source, {})
    for target in ("billing@1", AdapterRef("billing"), 9, "9", "nothing", True):
        with pytest.raises(AdapterError):
            registry.promote("support", target)
    assert registry.aliases("support") == {LATEST: 1}
    for act in (registry.rollback, registry.promote):
        with pytest.raises(AdapterError, match="'nobody' is not in"):
            act("nobody", "1") if act == registry.promote else act("nobody")
    assert not (registry.root / "nobody").exists()


def test_names_that_differ_only_in_case_are_refused(registry: Registry, source: Path) -> None:
    registry.publish("Support", source, {})
    with pytest.raises(AdapterError, match="only in case"):
        registry.publish("support", source, {})


def test_metadata_must_be_json(registry: Registry, source: Path) -> None:
    for metadata in ({"loss": float("nan")}, {"what": object()}):
        with pytest.raises(AdapterError, match="can't be written as JSON"):
            registry.publish("support", source, metadata)
    assert not registry.root.exists()


def test_a_root_that_is_a_file_is_one_sentence(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("")
    registry = Registry(tmp_path / "file")
    with pytest.raises(StorageError, match="can't be used"):
        registry.publish("support", source, {})
    with pytest.raises(UsageError, match="can't be used"):
        registry.names()
