"""What one adapter does to its own rows is nothing to others: not beside it, and not after it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from rayfin.config.schema import ModelConfig
from rayfin.errors import AdapterError, ModelError, RequestError
from rayfin.models import load_base
from rayfin.serving.engine.model import _check_attention
from rayfin.serving.engine.request import AdapterSource, SamplingParams

Adapters = dict[str, AdapterSource]


def overflowing(source: AdapterSource, directory: Path) -> AdapterSource:
    """The adapter with values that are finite, and whose products are not."""
    shutil.copytree(source.path, directory)
    file = directory / "adapter_model.safetensors"
    weights = {
        name: torch.full_like(tensor, 3e38 if "lora_A" in name else 1.0)
        for name, tensor in load_file(file).items()
    }
    save_file(weights, file, {"format": "pt"})
    return AdapterSource(f"{directory.name}@1", directory)


@pytest.fixture
def prompt(tiny_tokenizer: Any) -> list[int]:
    ids: list[int] = tiny_tokenizer("What is a list, and why?")["input_ids"]
    return ids


def test_a_row_that_was_no_number_is_clean_for_the_next(
    lab: Any, engines: Any, tiny: str, tiny_adapters: Adapters, prompt: list[int], tmp_path: Path
) -> None:
    engine = engines(tiny, max_rows=2, max_length=1024)
    hostile = overflowing(tiny_adapters["lora"], tmp_path / "hostile")
    alone = lab.ask(engine, prompt[:3], tiny_adapters["ia3"]).wait().token_ids
    beside = lab.ask(engine, prompt * 4, None, lab.greedy(800))
    while not beside.chunks:
        pass
    failed = lab.ask(engine, prompt * 6, hostile).wait().last
    assert failed.finish_reason == "error" and isinstance(failed.error, AdapterError)
    # The same row, shorter than what was there and than the one beside it.
    assert lab.ask(engine, prompt[:3], tiny_adapters["ia3"]).wait().token_ids == alone
    assert not beside.ended.is_set(), "nothing was beside it"
    assert beside.wait().last.finish_reason == "length"


def test_a_slot_that_overflowed_is_clean_for_the_next(
    lab: Any, engines: Any, tiny: str, tiny_adapters: Adapters, prompt: list[int], tmp_path: Path
) -> None:
    engine = engines(tiny, max_rows=4, slots=2, max_length=256)
    settings = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    wide = lab.make_adapter(tmp_path / "wide", tiny, settings, 7)
    hostile = overflowing(wide, tmp_path / "hostile")
    narrow = tiny_adapters["lora"]
    alone = [lab.ask(engine, prompt, source).wait().token_ids for source in (narrow, wide)]
    # It takes the slot of `narrow`, and loses it to it again; `wide` decodes beside it.
    assert lab.ask(engine, prompt, hostile).wait().last.finish_reason == "error"
    lab.ask(engine, prompt, wide).wait()
    both = [lab.ask(engine, prompt, source) for source in (narrow, wide)]
    assert [answer.wait().token_ids for answer in both] == alone


LONG_ROPE = {"rope_type": "longrope", "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sliding_window": 64}, "sliding_attention over 64"),
        ({"final_logit_softcapping": 30.0}, "soft caps"),
        ({"attn_logit_softcapping": 50.0}, "soft caps"),
        ({"logits_scaling": 8.0}, "scaled scores"),
        ({"logit_scale": 0.06}, "scaled scores"),
        ({"rope_parameters": LONG_ROPE}, "beyond 64"),
    ],
)
def test_models_that_it_would_answer_wrongly_are_refused(
    tiny: str, changes: dict[str, Any], reason: str
) -> None:
    base: Any = load_base(ModelConfig(name=tiny), None, "cpu")
    _check_attention(tiny, base, 128)
    for name, value in changes.items():
        setattr(base.config, name, value)
    with pytest.raises(ModelError, match=reason):
        _check_attention(tiny, base, 128)


@pytest.mark.parametrize(
    "wrong",
    [{"top_k": 1.5}, {"logprobs": 1.5}, {"max_tokens": 2.0}, {"seed": 10**400}, {"stop": "abc"}],
)
def test_sampling_that_would_fail_a_step_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_a_removed_version_leaves_its_slot(
    lab: Any, engines: Any, tiny: str, tiny_adapters: Adapters, prompt: list[int]
) -> None:
    engine = engines(tiny, max_rows=2, max_length=1024)
    source = tiny_adapters["lora"]
    long = lab.ask(engine, prompt, source, lab.greedy(400))
    while not long.chunks:
        pass
    engine.forget(source.ref)
    assert lab.ask(engine, prompt).wait().last.finish_reason == "length"
    assert source.ref in engine.resident()  # a row uses it
    assert len(long.wait().token_ids) == 400
    lab.ask(engine, prompt).wait()
    assert source.ref not in engine.resident()
