"""A mixed batch says, token for token, what plain PEFT says for each adapter alone.

Where two tokens are as likely, as far as rounding can tell, either is what PEFT says.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
from peft import PeftModel

from rayfin.config.schema import ModelConfig
from rayfin.methods import detach
from rayfin.models import load_base, load_tokenizer
from rayfin.serving.engine import model
from rayfin.serving.engine.engine import Engine
from rayfin.serving.engine.request import AdapterSource

PROMPTS = ("What is a list?", "Say something about the weather in spring, and then stop.")
TOKENS = 64
SMOLLM2, SMOLLM2_TOKENS = "smollm2-135m", 24
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


def assert_peft_agrees(
    lab: Any,
    base: tuple[str, Literal[4] | None],
    sources: dict[str, AdapterSource | None],
    prompts: list[list[int]],
    got: dict[str, list[list[int]]],
    tie: float,
) -> None:
    """Plain PEFT over `base`, a model and its bits, finds every token said the likeliest."""
    model: Any = load_base(ModelConfig(name=base[0]), base[1], "cpu")
    for name, source in sources.items():
        plain = PeftModel.from_pretrained(model, str(source.path)).eval() if source else model
        for prompt, answer in zip(prompts, got[name], strict=True):
            lab.assert_peft_prefers(plain, prompt, answer, tie)
        detach(plain)


@pytest.mark.numeric
@pytest.mark.parametrize(("quantization_bit", "kernel"), [(None, True), (None, False), (4, True)])
def test_every_method_on_the_tiny_model(
    lab: Any,
    engines: Any,
    tiny: str,
    tiny_adapters: dict[str, AdapterSource],
    tiny_tokenizer: Any,
    quantization_bit: Literal[4] | None,
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
    assert (engine.model.assignment.kernel is not None) == kernel
    assert (engine.model.cache.kernel is not None) == kernel
    assert engine.stats().running == 0
    tie = float_tie(rounding, layers=2, terms=128)
    if quantization_bit is None and kernel:  # PEFT's own decoding, once
        for name, source in sources.items():
            for prompt, answer in zip(prompts, got[name], strict=True):
                lab.assert_peft_would_say(tiny, source, prompt, answer, tie)
    else:
        assert_peft_agrees(lab, (tiny, quantization_bit), sources, prompts, got, tie)
    said = {tuple(map(tuple, answers)) for answers in got.values()}
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


@pytest.fixture(scope="module")
def smollm2_adapters(
    lab: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, AdapterSource]:
    sizes = {"lora": 0.02, "p_tuning": 0.05, "ia3": 0.2, "vera": 0.3}
    root = tmp_path_factory.mktemp("smollm2")
    return {
        name: lab.make_adapter(root / name, SMOLLM2, lab.METHODS[name], seed, size)
        for seed, (name, size) in enumerate(sizes.items())
    }


@pytest.mark.smollm2
@pytest.mark.slow
@pytest.mark.parametrize("quantization_bit", [None, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.timeout(1200)
def test_lora_p_tuning_ia3_and_vera_on_smollm2(
    lab: Any,
    engines: Any,
    smollm2_adapters: dict[str, AdapterSource],
    quantization_bit: Literal[4] | None,
    rounding: Any,
) -> None:
    """What PEFT's own decoding could say otherwise, the tiny model shows above."""
    prompt = load_tokenizer(ModelConfig(name=SMOLLM2))(PROMPTS[0])["input_ids"]
    engine = engines(SMOLLM2, slots=5, max_length=256, quantization_bit=quantization_bit)
    sources: dict[str, AdapterSource | None] = {"base": None, **smollm2_adapters}
    got = mixed(lab, engine, sources, [prompt], SMOLLM2_TOKENS)
    tie = float_tie(rounding, layers=30, terms=1536)
    assert_peft_agrees(lab, (SMOLLM2, quantization_bit), sources, [prompt], got, tie)
    assert len({tuple(answers[0]) for answers in got.values()}) == len(sources)
