"""Damaged adapters are named, and nothing outside the registry or the source is opened."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from rayfin.adapters import Registry
from rayfin.errors import AdapterError

HEADER = {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def safetensors(header: object = HEADER, data: bytes = bytes(16)) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def source(tmp_path: Path) -> Path:
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    (trained / WEIGHTS).write_bytes(safetensors())
    return trained


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "adapters")


DAMAGE = {
    "truncated": (WEIGHTS, safetensors()[:-1]),
    "longer": (WEIGHTS, safetensors() + b"x"),
    "empty": (WEIGHTS, b""),
    "no tensors": (WEIGHTS, safetensors({}, b"")),
    "huge header": (WEIGHTS, struct.pack("<Q", 2**62) + b"{}"),
    "deep header": (WEIGHTS, struct.pack("<Q", 10**5) + b"[" * 10**5),
    "shape beyond the file": (
        WEIGHTS,
        safetensors({"w": {"dtype": "F32", "shape": [10**6, 10**9], "data_offsets": [0, 16]}}),
    ),
    "renamed pickle": (WEIGHTS, pickle.dumps({"w": [0.0] * 100})),
    "broken JSON": (CONFIG, b'{"peft_type":'),
    "deep JSON": (CONFIG, b"[" * 10**5),
    "not an object": (CONFIG, b"[]"),
    "no peft_type": (CONFIG, b"{}"),
    "peft_type of another type": (CONFIG, b'{"peft_type": 1}'),
    "not UTF-8": (CONFIG, b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_adapters_are_neither_published_nor_promoted(
    registry: Registry, source: Path, damage: str
) -> None:
    good = registry.publish("support", source, {})
    name, content = DAMAGE[damage]
    (source / name).write_bytes(content)
    with pytest.raises(AdapterError, match=name) as refused:
        registry.publish("support", source, {})
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
    assert registry.versions("support") == (1,)

    (good.path / name).chmod(0o644)
    (good.path / name).write_bytes(content)
    for act in (registry.verify, lambda ref: registry.promote("support", ref)):
        with pytest.raises(AdapterError, match=name):
            act("support@1")
    assert registry.aliases("support") == {"latest": 1}
    registry.remove("support@1")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
        (lambda path: (path / "evil.pkl").write_bytes(b""), "evil.pkl was not published with it"),
        (lambda path: (path / "extra").mkdir(), "no regular file"),
        (lambda path: (path / CONFIG).write_text('{"peft_type": "IA3"}'), f"{CONFIG} changed"),
    ],
)
def test_verify_finds_what_changed(
    registry: Registry, source: Path, spoil: Callable[[Path], object], message: str
) -> None:
    path = registry.publish("support", source, {}).path
    (path / CONFIG).chmod(0o644)
    spoil(path)
    with pytest.raises(AdapterError, match=message):
        registry.verify("support")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"peft_type": "LORA", "files": {"a": 1}}'])
def test_a_damaged_record_hides_no_other_version(
    registry: Registry, source: Path, content: str
) -> None:
    for _ in range(2):
        registry.publish("support", source, {})
    record = registry.root / "support" / "1" / "rayfin.json"
    record.chmod(0o644)
    record.write_text(content)
    versions, problems = registry.scan()
    assert [version.ref for version in versions] == ["support@2"]
    assert "support/1/rayfin.json" in str(problems[0])
    with pytest.raises(AdapterError, match=r"1/rayfin\.json"):
        registry.resolve("support@1")
    registry.remove("support@1")


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}"),
        '{"aliases": {"../x": 1}, "history": {}, "newest": 1}',
        '{"aliases": {"prod": "../1"}, "history": {}, "newest": 1}',
        '{"aliases": {"prod": -1}, "history": [], "newest": 1}',
    ],
)
def test_damaged_aliases_are_named(registry: Registry, source: Path, content: str) -> None:
    registry.publish("support", source, {})
    (registry.root / "support" / "aliases.json").write_text(content)
    with pytest.raises(AdapterError, match=r"aliases\.json"):
        registry.resolve("support")
    assert len(registry.scan()[1]) == 1


def test_pickled_weights_are_not_taken(registry: Registry, source: Path) -> None:
    (source / WEIGHTS).rename(source / "adapter_model.bin")
    with pytest.raises(AdapterError, match="only safetensors are read"):
        registry.publish("support", source, {})
    with pytest.raises(AdapterError, match="neither adapter_config"):
        registry.publish("support", source.parent, {})
    with pytest.raises(AdapterError, match="no directory"):
        registry.publish("support", source / "nothing", {})


@pytest.mark.parametrize("name", ["../out", "/out", "..", ".", "a/../../out", "a\\b", "", "a\0"])
def test_no_name_leaves_the_root(registry: Registry, source: Path, name: str) -> None:
    before = sorted(registry.root.parent.iterdir())
    for act in (
        lambda: registry.publish(name, source, {}),
        lambda: registry.resolve(name),
        lambda: registry.versions(name),
        lambda: registry.aliases(name),
        lambda: registry.promote(name, 1),
        lambda: registry.rollback(name),
        lambda: registry.remove(f"{name}@1"),
    ):
        with pytest.raises(AdapterError, match="not allowed"):
            act()
    assert sorted(registry.root.parent.iterdir()) == before


def test_links_in_the_registry_are_not_followed(registry: Registry, source: Path) -> None:
    outside = registry.root.parent / "outside"
    elsewhere = Registry(outside)
    elsewhere.publish("secret", source, {})
    inside = registry.publish("support", source, {})
    (registry.root / "linked").symlink_to(outside / "secret")
    (registry.root / "support" / "2").symlink_to(outside / "secret" / "1")

    assert registry.names() == ("support",)
    assert registry.versions("support") == (1,)
    for ref in ("linked", "linked@1", "support@2"):
        with pytest.raises(AdapterError, match="is a link"):
            registry.resolve(ref)
    with pytest.raises(AdapterError, match="is a link"):
        registry.publish("linked", source, {})

    weights = inside.path / WEIGHTS
    weights.unlink()
    weights.symlink_to(outside / "secret" / "1" / WEIGHTS)
    for act in (registry.verify, lambda ref: registry.promote("support", ref)):
        with pytest.raises(AdapterError, match="no regular file"):
            act("support@1")
    aliases = registry.root / "support" / "aliases.json"
    aliases.unlink()
    aliases.symlink_to(outside / "secret" / "aliases.json")
    with pytest.raises(AdapterError, match="no regular file"):
        registry.resolve("support")


def test_a_link_for_a_lock_truncates_nothing(registry: Registry, source: Path) -> None:
    registry.root.mkdir()
    keep = registry.root.parent / "keep"
    keep.write_text("keep")
    (registry.root / ".lock").symlink_to(keep)
    with pytest.raises(AdapterError, match="is a link"):
        registry.publish("support", source, {})
    assert keep.read_text() == "keep"


def test_links_in_the_source_are_followed_inside_it_only(registry: Registry, source: Path) -> None:
    (source / "blob").write_text("{}")
    (source / "tokenizer.json").symlink_to("blob")
    version = registry.publish("support", source, {})
    assert not (version.path / "tokenizer.json").is_symlink()
    assert (version.path / "tokenizer.json").read_text() == "{}"

    (source / "vocab.json").symlink_to("/etc/hostname")
    with pytest.raises(AdapterError, match=r"vocab\.json' is a link out of"):
        registry.publish("support", source, {})
    (source / "vocab.json").unlink()
    os.mkfifo(source / "vocab.json")
    with pytest.raises(AdapterError, match=r"vocab\.json' is no regular file"):
        registry.publish("support", source, {})


def test_strangers_in_the_registry_are_ignored(registry: Registry, source: Path) -> None:
    registry.publish("support", source, {})
    home = registry.root / "support"
    (registry.root / "empty").mkdir()
    (registry.root / "notes.txt").write_text("")
    (registry.root / ".git").mkdir()
    (home / "notes").mkdir()
    (home / "02").mkdir()
    (home / "5").mkdir()  # a number that was never published, and isn't given out
    (home / ".2-half").mkdir()
    (home / ".2-half" / WEIGHTS).write_bytes(b"half")
    assert [version.ref for version in registry.list()] == ["support@1"]
    with pytest.raises(AdapterError, match="versions of 'support': 1"):
        registry.resolve("support@5")
    assert registry.publish("support", source, {}).version == 6
    assert not (home / ".2-half").exists()
    assert (home / "notes").exists()
