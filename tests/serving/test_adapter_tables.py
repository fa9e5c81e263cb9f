"""Adapters with an output head and embeddings of their own answer as PEFT says, side by side."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from rayfin.errors import AdapterError
from rayfin.serving.engine.request import AdapterSource

LM: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"], "r": 4}
KINDS = {
    "both": peft.LoraConfig(modules_to_save=["lm_head", "embed_tokens"], **LM),
    "head": peft.LoraConfig(modules_to_save=["lm_head"], **LM),
    "embeddings": peft.LoraConfig(modules_to_save=["model.embed_tokens"], use_dora=True, **LM),
    "vera": peft.VeraConfig(modules_to_save=["lm_head"], **LM),
    "adalora": peft.AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=4, total_step=9, modules_to_save=["embed_tokens"]
    ),
    "plain": peft.LoraConfig(**LM),
}
PROMPTS = ([7, 40, 12, 90, 3], [5, 60])


@pytest.fixture(scope="module")
def adapters(
    lab: Any, tiny: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, AdapterSource]:
    root = tmp_path_factory.mktemp("own")
    return {
        name: lab.make_adapter(root / name, tiny, copy.deepcopy(settings), seed)
        for seed, (name, settings) in enumerate(KINDS.items())
    }


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_each_answers_with_its_own(
    lab: Any, tiny: str, adapters: dict[str, AdapterSource], engines: Any, weights: str
) -> None:
    """Twice, so that a slot is given to another adapter, and its tables go with it."""
    engine = engines(tiny, max_length=64, slots=2, max_rows=4, weights=weights)
    for _ in range(2):
        asked = [
            (name, prompt, lab.ask(engine, prompt, adapters.get(name), lab.greedy(8)))
            for prompt in PROMPTS
            for name in (*KINDS, "base")
        ]
        for name, prompt, answer in asked:
            found = answer.wait().token_ids
            if weights == "auto":
                (expected,) = lab.peft_answers(tiny, adapters.get(name), [prompt], 8)
                assert found == expected, name
            assert len(found) == 8
    said = {name: answer.token_ids for name, prompt, answer in asked if prompt is PROMPTS[0]}
    assert said["both"] != said["plain"] != said["head"]


def test_their_memory_is_counted(
    tiny: str, adapters: dict[str, AdapterSource], engines: Any
) -> None:
    engine = engines(tiny, max_length=64, slots=2)
    both, plain = (engine.read(adapters[name]) for name in ("both", "plain"))
    assert both.nbytes - plain.nbytes == 2 * 260 * 64 * 4


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_slots_hold_no_more_of_them_than_they_may(
    lab: Any,
    tiny: str,
    adapters: dict[str, AdapterSource],
    engines: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Room for two tables, though there are slots for all adapters."""
    engine = engines(tiny, max_length=64, slots=4, max_rows=8)
    slots, tables = engine._scheduler.slots, engine.model._tables
    slots._most_table_bytes = 2 * 260 * 64 * 4
    fill, held = tables.fill, []

    def counted(*what: Any) -> None:
        fill(*what)
        held.append(tables.nbytes)

    monkeypatch.setattr(tables, "fill", counted)
    asked = [
        (name, prompt, lab.ask(engine, prompt, adapters[name], lab.greedy(8)))
        for prompt in PROMPTS * 2
        for name in KINDS
    ]
    for name, prompt, answer in asked:
        (expected,) = lab.peft_answers(tiny, adapters[name], [prompt], 8)
        assert answer.wait().token_ids == expected, name
    assert 0 < max(held) <= 2 * 260 * 64 * 4
    assert engine.stats().table_bytes == tables.nbytes == slots.table_bytes
    for name in KINDS:
        engine.forget(adapters[name].ref)
    lab.ask(engine, PROMPTS[0]).wait()
    assert tables.nbytes == engine.stats().table_bytes == 0, "what was removed took memory"


def test_an_adapter_that_has_more_than_slots_may_hold_is_refused(
    tiny: str, adapters: dict[str, AdapterSource], engines: Any
) -> None:
    engine = engines(tiny, max_length=64, tables_mb=0)
    with pytest.raises(
        AdapterError, match=r"embed_tokens take 1 MB.*set engine.tables_mb=1 or more$"
    ):
        engine.check(adapters["both"])
    engine.check(adapters["plain"])


def test_no_more_is_read_ahead_than_the_host_cache_may_hold(
    lab: Any, tiny: str, adapters: dict[str, AdapterSource], engines: Any
) -> None:
    """What waits for a slot is held by its request."""
    engine = engines(tiny, max_length=64, slots=1, host_cache_mb=0)
    lab.ask(engine, PROMPTS[0], adapters["both"]).wait()
    scheduler = engine._scheduler
    scheduler.slots._held[adapters["both"].ref].pins += 1  # as a long answer would
    first = lab.ask(engine, PROMPTS[0], adapters["head"])
    lab.Service.until(lambda: engine.stats().host_loads == 2)
    second = lab.ask(engine, PROMPTS[0], adapters["embeddings"])
    lab.Service.until(lambda: len(scheduler.waiting) == 2 and scheduler.waiting[1].held_back)
    assert scheduler.waiting[1].loading is None and engine.stats().host_loads == 2
    scheduler.slots.release(adapters["both"].ref)
    assert first.wait().token_ids and second.wait().token_ids


def test_tables_of_a_resized_vocabulary_are_refused(
    adapters: dict[str, AdapterSource], tiny: str, engines: Any, tmp_path: Path
) -> None:
    weights = load_file(adapters["both"].path / "adapter_model.safetensors")
    name = "base_model.model.lm_head.weight"
    weights[name] = torch.cat([weights[name], torch.zeros(4, 64)])
    for file in adapters["both"].path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(weights, tmp_path / "adapter_model.safetensors")
    engine = engines(tiny, max_length=64)
    with pytest.raises(AdapterError, match=r"lm_head.weight' has shape \[264, 64\]"):
        engine.check(AdapterSource("resized@1", tmp_path))


@pytest.mark.parametrize("bias", [False, True])
def test_biases_that_were_to_be_trained(
    lab: Any, tiny: str, engines: Any, tmp_path: Path, bias: bool
) -> None:
    """`tiny` has them in q_proj; down_proj has none, so that bias='lora_only' trains none."""
    target = ["q_proj"] if bias else ["down_proj"]
    settings = peft.LoraConfig(bias="lora_only", **{**LM, "target_modules": target})
    source = lab.make_adapter(tmp_path / "lora", tiny, settings, 3)
    engine = engines(tiny, max_length=64)
    if not bias:
        (expected,) = lab.peft_answers(tiny, source, PROMPTS[:1], 8)
        answer = lab.ask(engine, PROMPTS[0], source, lab.greedy(8)).wait()
        assert answer.token_ids == expected
        return
    with pytest.raises(AdapterError, match=r"does not serve the tensor .*bias"):
        engine.check(source)
    file = source.path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.endswith(".bias")}, file)
    with pytest.raises(AdapterError, match="bias='lora_only', and the file has no bias of 'model"):
        engine.check(AdapterSource("lost@1", source.path))
