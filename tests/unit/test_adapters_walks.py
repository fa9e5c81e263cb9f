"""Aliases over long walks: always where a plain model of them says."""

import json
import random
import struct
from pathlib import Path

import pytest

from rayfin.adapters import LATEST, AdapterRef, Registry
from rayfin.errors import AdapterError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    weights = struct.pack("<Q", len(header)) + header + b"1"
    (trained / "adapter_model.safetensors").write_bytes(weights)
    return trained


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "adapters")


@pytest.mark.parametrize("seed", range(3))
def test_random_walks_agree_with_a_plain_model(registry: Registry, source: Path, seed: int) -> None:
    """Any order of publish, promote, rollback and remove: what a dict and two lists would say."""
    dice = random.Random(seed)
    alive: list[int] = []
    used = 0
    past: dict[str, list[int]] = {}  # the last entry is where the alias points
    for _ in range(60):
        alias = dice.choice(["prod", "staging", None])
        act = dice.choice(["publish", "promote", "promote", "rollback", "remove"])
        target = dice.randint(1, used + 1)
        try:
            if act == "publish":
                assert registry.publish("walk", source, {}, alias=alias).version == used + 1
                used += 1
                alive.append(used)
                if alias:
                    past.setdefault(alias, []).append(used)
            elif act == "promote" and alias:
                registry.promote("walk", target, alias)
                assert target in alive
                if past.setdefault(alias, [0])[-1] != target:
                    past[alias].append(target)
                past[alias] = [version for version in past[alias] if version]
            elif act == "rollback" and alias:
                registry.rollback("walk", alias)
                past[alias].pop()
                assert past[alias][-1] in alive
            elif act == "remove":
                registry.remove(AdapterRef("walk", target))
                assert all(target != walk[-1] for walk in past.values())
                alive.remove(target)
        except AdapterError:
            held = {walk[-1] for walk in past.values()}
            back = past.get(alias or "", [])
            assert (
                (act == "promote" and target not in alive)
                or (act == "remove" and (target not in alive or target in held))
                or (act == "rollback" and (len(back) < 2 or back[-2] not in alive))
            )
        expected = {key: walk[-1] for key, walk in past.items()}
        if alive:
            expected[LATEST] = max(alive)
        assert registry.aliases("walk") == expected
        assert registry.versions("walk") == tuple(sorted(alive))


def test_the_past_of_an_alias_is_bounded(registry: Registry, source: Path) -> None:
    for _ in range(2):
        registry.publish("support", source, {})
    for turn in range(50):
        registry.promote("support", turn % 2 + 1)
    state = json.loads((registry.root / "support" / "aliases.json").read_text())
    assert len(state["history"]["prod"]) == 20
