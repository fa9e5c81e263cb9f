"""Adapters that an earlier rayfin published are listed, whole, and say what they said then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayfin.adapters import Registry
from rayfin.config.schema import ModelConfig
from rayfin.config.serving import EngineConfig
from rayfin.models import load_tokenizer
from rayfin.serving.engine.engine import Engine
from rayfin.serving.engine.request import AdapterSource

LONGEST_SUM = 128  # terms: the inner width of tiny's feed-forward layers
SINGLE = 2
"""How much further a single token's loss may be off than the mean of many."""
NAMES = ("adalora", "dora", "ia3", "lora", "p-tuning", "prefix-tuning")


def test_an_earlier_registry_is_listed_and_verified(storage_v1: Path) -> None:
    registry = Registry(storage_v1 / "runs" / "adapters")
    versions, problems = registry.scan()
    assert not problems
    found = {str(version.ref) for version in versions}
    assert found == {*(f"{name}@1" for name in NAMES), "lora@2"}
    for ref in found:
        registry.verify(ref)
    assert registry.aliases("lora") == {"latest": 2, "prod": 1}
    assert registry.aliases("ia3") == {"latest": 1, "staging": 1}
    assert str(registry.rollback("lora").ref) == "lora@2", "the version before is remembered"


@pytest.mark.numeric
def test_earlier_adapters_give_the_greedy_tokens_that_they_gave(
    lab: Any, rounding: Any, storage_v1: Path
) -> None:
    expected = json.loads((storage_v1 / "expected.json").read_text())
    tokenizer = load_tokenizer(ModelConfig(name="tiny"))
    prompts = [tokenizer(prompt)["input_ids"] for prompt in expected["prompts"]]
    engine = Engine(ModelConfig(name="tiny"), EngineConfig(max_length=256), use_gpu=False)
    engine.start()
    params = lab.greedy(8, logprobs=0)
    try:
        answers = {"base": [lab.ask(engine, ids, None, params) for ids in prompts]}
        for version in Registry(storage_v1 / "runs" / "adapters").list():
            source = AdapterSource(str(version.ref), version.path)
            answers[source.ref] = [lab.ask(engine, ids, source, params) for ids in prompts]
        found = {ref: [said(one.wait()) for one in told] for ref, told in answers.items()}
    finally:
        engine.close()
    assert found.keys() == expected["answers"].keys()
    for ref, answered in expected["answers"].items():
        tokens = [[token for token, _ in answer] for answer in answered]
        assert [[token for token, _ in answer] for answer in found[ref]] == tokens, ref
        # Tokens alone would not tell of an adapter that is read a little otherwise.
        likely = [one for answer in answered for _, one in answer]
        off = SINGLE * rounding.loss_error(-min(likely), LONGEST_SUM)
        given = [one for answer in found[ref] for _, one in answer]
        assert given == pytest.approx(likely, rel=0, abs=off), ref
    assert len({json.dumps(told) for told in found.values()}) == len(found), "each says its own"


def said(answer: Any) -> list[tuple[int, float]]:
    """Return an answer's tokens with their log-probabilities."""
    likely = [one.logprob for chunk in answer.chunks for one in chunk.logprobs]
    return list(zip(answer.token_ids, likely, strict=True))
