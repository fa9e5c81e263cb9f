"""The table of methods, what it refuses, and a base model that comes back as it was lent."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import pytest
import torch
from peft import PeftModel
from pydantic import TypeAdapter
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rayfin.config import Config, MethodConfig, ModelConfig, build_config
from rayfin.errors import ConfigError, MethodError
from rayfin.methods import (
    METHODS,
    attach,
    detach,
    linear_names,
    load_training_state,
    training_state,
)
from rayfin.methods.attach import _compute_in_float32
from rayfin.methods.initialization import check_rooms
from rayfin.models import load_base, locate
from rayfin.training.combination import check_combination
from rayfin.training.strategies import refusal

TINY = ModelConfig(name="tiny")
IDS = torch.arange(40).view(2, 20)
STEPS = 20
SHARING = [name for name, method in METHODS.items() if not method.changes_base]

Bits = Literal[4, 8] | None


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """A model this small gains nothing from a second thread, and waits for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    yield
    torch.set_num_threads(before)


def method(type: str, **settings: Any) -> MethodConfig:  # noqa: A002
    checked: MethodConfig = TypeAdapter(MethodConfig).validate_python({"type": type, **settings})
    return checked


def attached(base: PreTrainedModel, settings: MethodConfig) -> torch.nn.Module:
    return attach(base, settings, STEPS, locate(TINY))


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits
    ids = IDS.flatten()[:-1]
    return torch.nn.functional.cross_entropy(logits[:, -20:].flatten(0, 1)[1:].float(), ids)


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model: torch.nn.Module, settings: MethodConfig, first: int, last: int) -> None:
    """Steps `first` to `last` - 1, as the trainer takes them."""
    optimizer = optimizer_of(model)
    for step in range(first, last):
        loss = loss_of(model)
        if (penalty := settings.regularizer(model)) is not None:
            loss = loss + penalty
        loss.backward()
        optimizer.step()
        settings.after_optimizer_step(model, step)
        optimizer.zero_grad()


# --- the table ----------------------------------------------------------------------------


def test_every_method_is_in_the_table_under_its_own_name() -> None:
    for name, settings in METHODS.items():
        assert get_args(settings.model_fields["type"].annotation) == (name,)
        assert type(method(name)) is settings
    places = [settings.order for settings in METHODS.values()]
    assert places == sorted(set(places))


@pytest.mark.parametrize("name", METHODS)
def test_the_table_agrees_with_peft(name: str) -> None:
    config, facts = method(name).peft_config(STEPS, locate(TINY)), METHODS[name]
    assert (config is None) == facts.changes_base
    assert bool(config and config.is_prompt_learning) == facts.virtual_tokens
    # vLLM serves whole models and plain LoRA.
    plain = config is not None and config.peft_type == "LORA" and not config.use_dora  # type: ignore[attr-defined]
    assert ("vllm" in facts.engines) == (config is None or plain)


def test_methods_have_their_settings_in_pefts_config() -> None:
    dora = method("dora", r=4, lora_alpha=8.0, target_modules=["q_proj"], lora_dropout=0.1)
    lora = dora.peft_config(STEPS, "")
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (4, 8, 0.1)  # type: ignore[union-attr]
    assert isinstance(lora.lora_alpha, int) and lora.use_dora  # type: ignore[union-attr]
    assert lora.target_modules == {"q_proj"}  # type: ignore[union-attr]
    assert method("lora", lora_alpha=2.5).peft_config(STEPS, "").lora_alpha == 2.5  # type: ignore[union-attr]


# --- what is refused ----------------------------------------------------------------------

REFUSED = [
    ("full", {"quantization_bit": 4}, {}, "quantization_bit=4", "quantization_bit=null"),
    ("full", {"quantization_bit": 8}, {}, "no gradient", "lora, qlora"),
    ("p_tuning", {}, {"train.packing": True}, "train.packing=true", "train.packing=false"),
    ("prefix_tuning", {}, {"train.packing": True}, "one set of virtual tokens", "full, lora"),
    ("prompt_tuning", {}, {"train.packing": True}, "one set of virtual tokens", "full, lora"),
    (
        "prefix_tuning",
        {},
        {"train.gradient_checkpointing": True},
        "key-value cache",
        "train.gradient_checkpointing=false",
    ),
    ("adalora", {"init_r": 8, "target_r": 8}, {}, "target_r=8 with method.init_r=8", "below 8"),
    ("adalora", {"init_r": 4, "target_r": 6}, {}, "target_r=6 with method.init_r=4", "below 4"),
    ("adalora", {}, {"train.max_steps": 3}, "train.max_steps=3", "at least 4"),
    (
        "prompt_tuning",
        {"prompt_tuning_init": "TEXT"},
        {},
        "no text",
        "set method.prompt_tuning_init_text",
    ),
    ("qlora", {"init_lora_weights": "pissa"}, {}, "pissa", "quantization_bit=null"),
    ("lora", {"init_lora_weights": "olora", "quantization_bit": 8}, {}, "olora", "leave it out"),
    ("dora", {"init_lora_weights": "olora"}, {}, "no part of a DoRA", "use lora or rslora"),
    ("lora", {"init_lora_weights": "loftq"}, {}, "lost to 4 bits", "quantization_bit=4"),
    ("qlora", {"init_lora_weights": "loftq", "quantization_bit": 8}, {}, "to 4 bits", "bit=4, or"),
    (
        "dora",
        {"init_lora_weights": "loftq", "quantization_bit": 4},
        {},
        "DoRA's magnitudes",
        "use qlora or rslora",
    ),
    (
        "lora",
        {"init_lora_weights": "eva", "rank_pattern": {"q_proj": 4}},
        {},
        "one rank",
        "use method.r alone",
    ),
    ("lora", {"layers_to_transform": [0]}, {}, "beside names only", "target_modules=[q_proj,"),
    (
        "p_tuning",
        {"num_virtual_tokens": 64},
        {"data.max_length": 64},
        "num_virtual_tokens=64",
        "fewer",
    ),
]


def config_of(name: str, settings: dict[str, Any], others: dict[str, Any]) -> Config:
    sections: dict[str, Any] = {"method": {"type": name, **settings}}
    for dotted, value in others.items():
        section, _, key = dotted.partition(".")
        sections.setdefault(section, {})[key] = value
    return Config.model_validate(sections)


@pytest.mark.parametrize(("name", "settings", "others", "reason", "remedy"), REFUSED)
def test_what_cannot_work_is_refused_with_the_reason_and_the_remedy(
    name: str, settings: dict[str, Any], others: dict[str, Any], reason: str, remedy: str
) -> None:
    with pytest.raises(MethodError) as raised:
        check_combination(config_of(name, settings, others))
    message = str(raised.value)
    assert f"method.type={name}" in message
    assert reason in message and remedy in message
    assert "\n" not in message


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_accepted_as_it_comes(name: str) -> None:
    check_combination(config_of(name, {}, {}))


def test_modules_that_are_not_there_are_answered_with_those_that_are() -> None:
    base = load_base(TINY, None, "cpu")
    with pytest.raises(MethodError, match="its linear modules are: down_proj, gate_proj"):
        attached(base, method("lora", target_modules=["query_key_value"]))


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("first", ["q_proj", "layers.1.self_attn.q_proj"])
def test_two_names_of_one_module_in_a_pattern_are_refused(setting: str, first: str) -> None:
    """PEFT takes the first of them while it trains, and saves them in another order."""
    pattern = {first: 4, "layers.1.self_attn.q_proj": 8, "q_proj": 2}
    base = load_base(TINY, None, "cpu")
    with pytest.raises(MethodError, match=f"{setting}: .* both name '.*layers.1.self_attn.q_proj'"):
        attached(base, method("lora", **{setting: pattern}))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_head_that_is_named_may_have_a_rank_of_its_own() -> None:
    base = load_base(TINY, None, "cpu")
    settings = method("lora", target_modules=["q_proj", "lm_head"], rank_pattern={"lm_head": 4})
    model = attached(base, settings)
    assert model.get_submodule("base_model.model.lm_head").r == {"default": 4}


@pytest.mark.parametrize("init", ["pissa", "olora", "eva"])
def test_a_rank_that_a_layer_has_no_room_for_is_refused(init: str) -> None:
    with pytest.raises(MethodError, match=r"rank 512 is more than .*; use a smaller method\.r"):
        attached(load_base(TINY, None, "cpu"), method("lora", r=512, init_lora_weights=init))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank_pattern": {"q_prj": 4}}, "rank_pattern: 'q_prj' is none of the 14 modules"),
        ({"alpha_pattern": {"lm_head": 4}}, "alpha_pattern: 'lm_head' is none of"),
        (
            {"rank_pattern": {"k_proj": 4}, "exclude_modules": ["k_proj"]},
            "rank_pattern: 'k_proj' is none of the 12 modules that are adapted, such as 'model",
        ),
        ({"target_modules": ["q_proj"], "exclude_modules": ["up_proj"]}, "exclude_modules: 'up"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, "to_transform: 2 is none"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "leave none of the 2"),
        (
            {
                "target_modules": ["model.layers.0.self_attn.q_proj", "k_proj"],
                "layers_to_transform": [0],
            },
            "to_transform has no effect on 'model.layers.0.*; write its last part, q_proj, in",
        ),
        ({"modules_to_save": ["head"]}, "modules_to_save: 'head' is no module of this model"),
        (
            {"modules_to_save": ["norm"]},
            "would take 'norm' for 'model.layers.0.input_layernorm', too; write .* model.norm$",
        ),
    ],
)
def test_what_would_change_nothing_is_refused(settings: dict[str, Any], said: str) -> None:
    base = load_base(TINY, None, "cpu")
    before = base.state_dict()
    with pytest.raises(MethodError, match=said) as raised:
        attached(base, method("lora", **settings))
    assert "\n" not in str(raised.value) and re.search("leave|write", str(raised.value))
    assert base.state_dict().keys() == before.keys()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_module_is_not_trained_whole(bits: Bits) -> None:
    settings = method("lora", quantization_bit=bits, modules_to_save=["v_proj"])
    with pytest.raises(MethodError, match=rf"layers.0.self_attn.v_proj' is in {bits} bits, and"):
        attached(load_base(TINY, bits, "cpu"), settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"type": "loha"}, "type=loha can't adapt 'transformer.h.0.attn.c_attn', a Conv1D"),
        ({"type": "oft"}, "type=oft can't adapt 'transformer.h.0.attn.c_attn', a Conv1D"),
        ({"type": "lora", "init_lora_weights": "olora"}, "can't decompose .*; use pissa"),
        ({"type": "qlora", "init_lora_weights": "loftq"}, "lost part .* can't compute; use eva"),
        (
            {"type": "qlora", "init_lora_weights": "loftq", "target_modules": ["attn.c_proj"]},
            "loftq: 'transformer.h.0.attn.c_proj' is a Conv1D .* use eva, or leave it out",
        ),
    ],
)
def test_what_cannot_adapt_conv1d_says_so_of_a_model_without_weights(
    settings: dict[str, Any], said: str
) -> None:
    small = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8)
    with torch.device("meta"):
        base = GPT2LMHeadModel(small)
    assert method(**settings).depends_on_base
    with pytest.raises(MethodError, match=said):
        method(**settings).check_base(base)
    method("lora", init_lora_weights="pissa", modules_to_save=["ln_f"]).check_base(base)


def test_a_quantised_conv1d_is_known_for_one() -> None:
    """Transformers puts a layer of bitsandbytes in its place, whose weight is transposed."""
    proxy = torch.nn.Linear(8, 8)
    proxy.source_cls = Conv1D  # type: ignore[assignment]
    with pytest.raises(MethodError, match="loftq: 'c_proj' is a Conv1D"):
        check_rooms("loftq", {"c_proj": proxy}, lambda _: 4)
    check_rooms("eva", {"c_proj": proxy}, lambda _: 4)


def test_loftq_makes_up_for_most_of_what_four_bits_lost() -> None:
    whole, settings = load_base(TINY, None, "cpu"), method("qlora", r=32, init_lora_weights="loftq")
    quantised = load_base(TINY, 4, "cpu")

    def error(of: torch.nn.Module) -> float:
        with torch.no_grad():
            return float((of(input_ids=IDS).logits - whole(input_ids=IDS).logits).square().mean())

    lost = error(quantised)
    model = attached(quantised, settings)
    settings.initialize(model, lambda: Path(locate(TINY)), lambda _: iter(()))
    assert error(model) < lost / 4
    with pytest.raises(MethodError, match="no safetensors file in '/nowhere' has the whole weight"):
        settings.initialize(model, lambda: Path("/nowhere"), lambda _: iter(()))


def test_eva_gives_up_on_directions_that_never_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayfin.methods.initialization._MOST_BATCHES", 3)
    settings = method("lora", r=4, init_lora_weights="eva")
    model = attached(load_base(TINY, None, "cpu"), settings)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    with pytest.raises(MethodError, match=r"eva: .* not settled after 3 batches; use a smaller"):
        settings.initialize(model, Path, lambda _: repeat(batch))


@pytest.mark.parametrize("names", [["lm_head", "embed_tokens"], ["model.norm"]])
def test_a_module_that_is_trained_whole_stands_in_a_base_of_another_type(names: list[str]) -> None:
    base = load_base(ModelConfig(name="tiny", dtype="bfloat16"), None, "cpu")
    before = snapshot(base)
    settings = method("lora", modules_to_save=names)
    model = attached(base, settings)
    own = [p for n, p in model.named_parameters() if "modules_to_save" in n]
    assert {p.dtype for p in own} == {torch.float32}
    assert torch.equal(model(input_ids=IDS).logits, before["answer"])
    train(model, settings, 0, 2)
    detach(model)
    assert_same(before, snapshot(base))


def test_a_module_that_is_trained_whole_is_computed_in_the_type_that_it_was_cast_to() -> None:
    """DeepSpeed casts the whole model to bfloat16 once the adapter is attached."""
    own = torch.nn.Linear(4, 4)
    wrapper = SimpleNamespace(
        modules_to_save={"default": own}, original_module=torch.nn.Linear(4, 4).bfloat16()
    )
    _compute_in_float32(wrapper)
    inputs = torch.ones(1, 4, dtype=torch.bfloat16)
    assert own(inputs).dtype == own.bfloat16()(inputs).dtype == torch.bfloat16


@pytest.mark.parametrize("pattern", ["q_proj|k_proj", ".*", ""])
def test_a_pattern_has_names_and_no_expressions(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"method\.rank_pattern"):
        build_config({"method": {"type": "lora", "rank_pattern": {pattern: 4}}})


def test_strategies_that_cannot_train_a_setting_say_so() -> None:
    pissa, plus = method("lora", init_lora_weights="pissa"), method("lora", loraplus_lr_ratio=4)
    assert "use ddp" in str(refusal("fsdp", pissa)) and refusal("ddp", pissa) is None
    assert "use ddp or fsdp" in str(refusal("deepspeed-zero2", plus))
    assert refusal("fsdp", plus) is None is refusal("deepspeed-zero2", method("lora"))


def test_the_output_head_is_no_target() -> None:
    base = load_base(TINY, None, "cpu")
    names = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"
    assert linear_names(base) == names.split()


# --- lending the base ---------------------------------------------------------------------


@pytest.fixture(scope="module", params=[None, 4, 8], ids=["whole", "nf4", "int8"])
def lent(request: pytest.FixtureRequest) -> PreTrainedModel:
    base = load_base(TINY, request.param, "cpu")
    base(input_ids=IDS)  # 8-bit layers set themselves up on their first call
    return base


def snapshot(base: PreTrainedModel) -> dict[str, Any]:
    """All that an adapter could leave behind on a base model."""
    return {
        "tensors": {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in base.state_dict().items()
        },
        "modules": {name: (type(m), m.training) for name, m in base.named_modules()},
        "hooks": {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in base.named_modules()
        },
        "trained": [name for name, p in base.named_parameters() if p.requires_grad],
        "gradients": [name for name, p in base.named_parameters() if p.grad is not None],
        "recomputes": base.is_activation_checkpointing,
        "config": base.config.to_dict(),
        "adapter": hasattr(base, "peft_config"),
        "answer": base(input_ids=IDS).logits.detach(),
    }


def assert_same(before: Any, after: Any) -> None:
    if isinstance(before, dict):
        assert list(before) == list(after)
        for name in before:
            assert_same(before[name], after[name])
    elif isinstance(before, torch.Tensor):
        assert before.dtype == after.dtype and torch.equal(before, after)
    else:
        assert before == after


@pytest.mark.numeric
@pytest.mark.parametrize("name", SHARING)
def test_the_base_comes_back_as_it_was(
    name: str, lent: PreTrainedModel, request: pytest.FixtureRequest
) -> None:
    if request.node.callspec.params["lent"] and not METHODS[name].quantized_base:
        pytest.skip(f"{name} is refused over quantised weights")
    before = snapshot(lent)
    settings = method(name)
    model = attached(lent, settings)
    model.train()
    if METHODS[name].gradient_checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    train(model, settings, 0, 2)
    detach(model)
    assert_same(before, snapshot(lent))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", METHODS)
def test_what_is_trained_is_float32_whatever_the_base_is(name: str, dtype: Any) -> None:
    base = load_base(ModelConfig(name="tiny", dtype=dtype), None, "cpu")
    model = attached(base, method(name))
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    loss_of(model).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# --- AdaLoRA ------------------------------------------------------------------------------

ADALORA = {"init_r": 6, "target_r": 3}


def kept_ranks(model: torch.nn.Module) -> int:
    return sum(int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name)


def test_adaloras_budget_shrinks_to_its_target() -> None:
    settings = method("adalora", **ADALORA)
    model = attached(load_base(TINY, None, "cpu"), settings)
    matrices = sum("lora_E" in name for name, _ in model.named_parameters())
    train(model, settings, 0, STEPS // 10)
    assert kept_ranks(model) == 6 * matrices
    train(model, settings, STEPS // 10, STEPS)
    assert kept_ranks(model) == 3 * matrices
    pattern = model.peft_config["default"].rank_pattern  # type: ignore[union-attr,index]
    assert sum(sum(kept) for kept in pattern.values()) == 3 * matrices
    # What was learned, not the order of the layers, says where the ranks stay.
    assert len({sum(kept) for kept in pattern.values()}) > 1


@pytest.mark.numeric
def test_adaloras_penalty_is_pefts_own(rounding: Any) -> None:
    settings = method("adalora", orth_reg_weight=0.3)
    model = attached(load_base(TINY, None, "cpu"), settings)
    train(model, settings, 0, 2)
    assert isinstance(model, PeftModel)
    inputs = {"input_ids": IDS, "labels": IDS}
    with torch.no_grad():
        whole = float(model(**inputs).loss)
        theirs = whole - float(model.get_base_model()(**inputs).loss)
        ours = settings.regularizer(model)
    assert theirs > 0.1
    # The sum with the loss rounds once; the penalty is a norm of products over 128 inputs at most.
    bound = rounding.unit_roundoff() * whole + 2 * rounding.growth(128) * theirs
    assert ours is not None and abs(float(ours) - theirs) <= bound
    assert method("adalora", orth_reg_weight=0).regularizer(model) is None
    assert method("lora").regularizer(model) is None


@pytest.mark.numeric
@pytest.mark.parametrize("name", METHODS)
def test_a_training_state_goes_into_a_fresh_model(name: str) -> None:
    settings = method(name, **(ADALORA if name == "adalora" else {}))
    trained = attached(load_base(TINY, None, "cpu"), settings)
    train(trained, settings, 0, 4)
    fresh = attached(load_base(TINY, None, "cpu"), settings)
    load_training_state(fresh, training_state(trained))
    assert torch.equal(loss_of(trained.eval()), loss_of(fresh.eval()))
    train(trained, settings, 4, 6)
    train(fresh, settings, 4, 6)
    assert_same(training_state(trained), training_state(fresh))
