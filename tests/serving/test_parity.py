"""A mixed batch says, token for token, what plain PEFT says for each adapter alone.

Where two tokens are as likely, as far as rounding can tell, either is what PEFT says.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from rayfin.config.schema import ModelConfig
from rayfin.models import load_tokenizer
from rayfin.serving.engine import model
from rayfin.serving.engine.engine import Engine
from rayfin.serving.engine.request import AdapterSource

PROMPTS = ("What is a list?", "Say something about the weather in spring, and then stop.")
TOKENS = 64
EIGHT_BIT_TIE = 1 / 127
"""LLM.int8() rounds a layer's inputs to 127 steps: a last digit can turn one by a whole step."""


def float_tie(rounding: Any, layers: int, terms: int) -> float:
    """Of the largest logit: a layer has four products one after the other, the head is one more.

    Their roundings go both ways, so that they add up by the root of their number.
    """
    return float(2 * rounding.growth(terms) * math.sqrt(4 * layers + 1))


def mixed(
    lab: Any,
    engine: Engine,
    sources: dict[str, AdapterSource | None],
    prompts: list[list[int]],
    tokens: int,
) -> dict[str, list[list[int]]]:
    """All prompts of all adapters in one batch."""
    answers: dict[str, list[Any]] = {
        name: [lab.ask(engine, prompt, source, lab.greedy(tokens)) for prompt in prompts]
        for name, source in sources.items()
    }
    for name, given in answers.items():
        for answer in given:
            assert answer.wait().last.finish_reason == "length", (name, answer.last.error)
    return {name: [answer.token_ids for answer in given] for name, given in answers.items()}


@pytest.mark.numeric
@pytest.mark.parametrize(("quantization_bit", "kernel"), [(None, True), (None, False), (4, True)])
def test_every_method_on_the_tiny_model(
    lab: Any,
    engines: Any,
    tiny: str,
    tiny_adapters: dict[str, AdapterSource],
    tiny_tokenizer: Any,
    quantization_bit: int | None,
    kernel: bool,
    monkeypatch: pytest.MonkeyPatch,
    rounding: Any,
) -> None:
    if not kernel:  # as on GPUs, and where there is no C compiler
        monkeypatch.setattr(model, "kernel_for", lambda device, dtype: None)
        monkeypatch.setattr(model.attention, "kernel_for", lambda device, dtype, group: None)
    prompts = [tiny_tokenizer(text)["input_ids"] for text in PROMPTS]
    engine = engines(
        tiny,
        max_rows=20,
        slots=len(lab.METHODS),
        max_length=256,
        prefill_chunk=16,
        quantization_bit=quantization_bit,
    )
    sources: dict[str, AdapterSource | None] = {**tiny_adapters, "base": None}
    got = mixed(lab, engine, sources, prompts, TOKENS)
    assert (engine.model.mixture.kernel is not None) == kernel
    assert (engine.model.cache.kernel is not None) == kernel
    assert engine.stats().running == 0
    said = set()
    for name, source in sources.items():
        for prompt, answer in zip(prompts, got[name], strict=True):
            tie = float_tie(rounding, layers=2, terms=128)
            lab.assert_peft_would_say(tiny, source, prompt, answer, tie, quantization_bit)
        said.add(tuple(map(tuple, got[name])))
    # Else the comparison would pass for adapters that do nothing.
    assert len(said) == len(sources)


@pytest.mark.numeric
def test_an_8_bit_base_answers_alone_as_peft_does(
    lab: Any,
    engines: Any,
    tiny: str,
    tiny_adapters: dict[str, AdapterSource],
    tiny_tokenizer: Any,
) -> None:
    """One request at a time: LLM.int8() treats outliers by the columns of a whole batch, so that
    what is beside a row has a say in its last digits."""
    prompts = [tiny_tokenizer(PROMPTS[0])["input_ids"]]
    engine = engines(tiny, slots=2, max_length=256, quantization_bit=8)
    sources: dict[str, AdapterSource | None] = {**tiny_adapters, "base": None}
    del sources["dora"]  # PEFT itself loses the 8-bit weights' scales under DoRA on CPU
    for name, source in sources.items():
        got = mixed(lab, engine, {name: source}, prompts, TOKENS)
        lab.assert_peft_would_say(tiny, source, prompts[0], got[name][0], EIGHT_BIT_TIE, 8)


@pytest.mark.smollm2
@pytest.mark.slow
@pytest.mark.parametrize("quantization_bit", [None, 4])
@pytest.mark.timeout(600)
def test_lora_p_tuning_and_ia3_on_smollm2(
    lab: Any, engines: Any, tmp_path: Path, quantization_bit: int | None, rounding: Any
) -> None:
    tokenizer = load_tokenizer(ModelConfig(name="smollm2-135m"))
    prompts = [tokenizer(PROMPTS[0])["input_ids"]]
    sizes = {"lora": 0.02, "p_tuning": 0.05, "ia3": 0.2}
    sources: dict[str, AdapterSource | None] = {"base": None}
    for seed, (name, size) in enumerate(sizes.items()):
        sources[name] = lab.make_adapter(
            tmp_path / name, "smollm2-135m", lab.METHODS[name], seed, size
        )
    engine = engines("smollm2-135m", slots=4, max_length=256, quantization_bit=quantization_bit)
    got = mixed(lab, engine, sources, prompts, TOKENS)
    said = set()
    for name, source in sources.items():
        tie = float_tie(rounding, layers=30, terms=1536)
        answer = got[name][0]
        lab.assert_peft_would_say("smollm2-135m", source, prompts[0], answer, tie, quantization_bit)
        said.add(tuple(answer))
    assert len(said) == len(sources)
