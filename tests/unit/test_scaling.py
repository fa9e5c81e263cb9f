"""How workers share a step, which strategies are refused before a launch, and what auto takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayfin.config import Config, TrainConfig, load_config
from rayfin.config.schema import Strategy
from rayfin.errors import ConfigError
from rayfin.hardware import Hardware
from rayfin.models import ModelFacts, describe_model
from rayfin.training import strategies
from rayfin.training.sharding import UnshardedBytes, held
from rayfin.training.strategies import (
    STRATEGIES,
    Share,
    check_scaling,
    choose,
    needs_group,
    share_of_step,
    verified,
)
from rayfin.training.strategy_files import deepspeed_settings, lay_over


def config(*settings: str) -> Config:
    return load_config(None, ["model.name=tiny", *settings])


@pytest.mark.parametrize(
    ("batch", "accumulation", "workers", "share"),
    [
        (8, 2, 1, Share(8, 2)),
        (8, 2, 2, Share(8, 1)),
        (8, 2, 4, Share(4, 1)),
        (8, 2, 16, Share(1, 1)),
        (4, 3, 2, Share(3, 2)),
        (1, 16, 4, Share(1, 4)),
        (6, 1, 3, Share(2, 1)),
    ],
)
def test_workers_share_the_samples_of_a_step(
    batch: int, accumulation: int, workers: int, share: Share
) -> None:
    train = TrainConfig(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    assert share_of_step(train, workers) == share
    assert share.batch_size * share.accumulation * workers == batch * accumulation
    assert share.batch_size <= batch


def test_an_uneven_share_is_refused_with_what_would_do() -> None:
    with pytest.raises(ConfigError, match=r"share the 8 samples .* use 1, 2, 4, 8 workers") as it:
        check_scaling(config("scaling.num_workers=3", "train.per_device_train_batch_size=8"))
    remedy = "train.gradient_accumulation_steps=3"
    assert remedy in str(it.value)
    check_scaling(config("scaling.num_workers=3", "train.per_device_train_batch_size=8", remedy))


OFFLOAD = "scaling.cpu_offload=true"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["scaling.strategy=deepspeed-zero3", "method.type=qlora"], "with 4-bit weights.*use fsdp"),
        (["scaling.strategy=deepspeed-zero1", "method.type=adalora"], "AdaLoRA.*use ddp or fsdp"),
        (
            ["scaling.strategy=fsdp", "method.type=lora", "method.quantization_bit=8"],
            "with 8-bit weights.*quantization_bit=4",
        ),
        (
            ["scaling.strategy=deepspeed-zero2", "method.type=lora", "train.optim=lion_8bit"],
            "adamw_torch_fused and adamw_torch, not train.optim=lion_8bit; .*or ddp or fsdp, where",
        ),
        (
            ["scaling.strategy=fsdp", "method.type=full", "train.optim=adafactor"],
            "not train.optim=adafactor.*or ddp, where",
        ),
        ([OFFLOAD], "strategy=auto.*name one of fsdp"),
        ([OFFLOAD, "scaling.strategy=ddp"], "strategy=ddp.*name one of fsdp"),
        ([OFFLOAD, "scaling.strategy=fsdp", "scaling.use_gpu=false"], "leave it out"),
        (["scaling.strategy_config=x.json"], "strategy=auto.*name its strategy"),
        (["scaling.strategy=fsdp", "scaling.strategy_config=no.json"], "'no.json' can't be read"),
    ],
)
def test_what_can_t_work_is_refused(settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_scaling(config("scaling.num_workers=2", *settings))


def test_deepspeed_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "_installed", lambda _: False)
    with pytest.raises(ConfigError, match=r"pip install 'rayfin\[deepspeed\]'"):
        check_scaling(config("method.type=lora", "scaling.strategy=deepspeed-zero2"))


def test_one_process_needs_a_group_only_to_shard() -> None:
    assert not needs_group(config().scaling)
    assert not needs_group(config("scaling.strategy=ddp").scaling)
    assert needs_group(config("scaling.num_workers=2").scaling)
    assert needs_group(config("scaling.strategy=deepspeed-zero2").scaling)


Write = Callable[[Any], list[str]]


@pytest.fixture
def own(tmp_path: Path) -> Write:
    def write(content: Any) -> list[str]:
        path = tmp_path / "own.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return ["method.type=lora", f"scaling.strategy_config={path}"]

    return write


@pytest.mark.parametrize(
    ("strategy", "content", "words"),
    [
        ("fsdp", "{", "can't be read"),
        ("fsdp", [], "no JSON object"),
        ("fsdp", {"reshard_after": True}, "did you mean 'reshard_after_forward'"),
        ("fsdp", {"reshard_after_forward": "yes"}, "must be true or false"),
        ("fsdp", {"transformer_layer_cls_to_wrap": [1]}, "class's name"),
        ("fsdp", {"state_dict_type": "FULL_STATE_DICT"}, "not for the file"),
        ("deepspeed-zero2", {"optimizer": {"type": "Lamb"}}, "learning_rate"),
        ("deepspeed-zero2", {"scheduler": {}}, "lr_scheduler_type"),
        ("deepspeed-zero2", {"zero_optimisation": {}}, "did you mean 'zero_optimization'"),
        ("deepspeed-zero2", {"zero_optimization": 2}, "no object"),
        ("deepspeed-zero2", {"gradient_clipping": 7}, "train.max_grad_norm"),
        ("deepspeed-zero2", {"zero_optimization": {"stage": 3}}, "scaling.strategy"),
        (
            "deepspeed-zero3",
            {"zero_optimization": {"reduce_bucket_sise": 1}},
            "did you mean 'reduce_bucket_size'",
        ),
    ],
)
def test_a_file_that_can_t_be_used_is_refused(
    own: Write, strategy: str, content: Any, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_scaling(config(f"scaling.strategy={strategy}", *own(content)))


def test_a_file_that_can_be_used_is_taken(own: Write) -> None:
    zero = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e7},
        "bf16": {"enabled": "auto"},
    }
    check_scaling(config("scaling.strategy=deepspeed-zero2", *own(zero)))
    fsdp = {
        "fsdp_reshard_after_forward": False,
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    }
    check_scaling(config("scaling.strategy=fsdp", *own(fsdp)))


def generated(own: dict[str, Any] | None = None, *, offload: bool = False) -> dict[str, Any]:
    return deepspeed_settings(
        "deepspeed-zero3",
        own,
        batch_size=4,
        accumulation=2,
        workers=3,
        max_grad_norm=0.5,
        precision="bfloat16",
        offload=offload,
    )


def test_deepspeed_gets_rayfin_s_own_settings() -> None:
    found = generated()
    assert found["train_batch_size"] == 24
    assert found["train_micro_batch_size_per_gpu"] == 4
    assert found["gradient_accumulation_steps"] == 2
    assert found["gradient_clipping"] == 0.5
    assert found["bf16"] == {"enabled": True} and found["fp16"] == {"enabled": False}
    assert found["zero_optimization"] == {"stage": 3}
    offloaded = generated(offload=True)["zero_optimization"]
    assert offloaded["offload_optimizer"]["device"] == offloaded["offload_param"]["device"] == "cpu"


def test_deepspeed_takes_what_is_generated() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert DeepSpeedZeroConfig(**generated(offload=True)["zero_optimization"]).stage == 3


def test_own_settings_add_and_never_contradict() -> None:
    more = {
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": 7},
        "fp16": {"enabled": False},
    }
    found = generated(more)
    assert found["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 7}
    for contradiction, words in (
        ({"gradient_clipping": 1.0}, "train.max_grad_norm"),
        ({"train_batch_size": 8}, "per_device_train_batch_size"),
        ({"bf16": {"enabled": False}}, "the device"),
        ({"zero_optimization": {"stage": 2}}, "scaling.strategy"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "scaling.cpu_offload"),
    ):
        with pytest.raises(ConfigError, match=words):
            generated(contradiction)
    off = {"zero_optimization": {"offload_optimizer": {"device": "none"}}}
    assert "offload_optimizer" not in generated(off)["zero_optimization"]
    same = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}
    assert generated(same, offload=True)["zero_optimization"]["offload_param"]
    assert lay_over({}, {"a": {"b": 1}}) == {"a": {"b": 1}}


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    """A model of 3 B: of the tiny one, two blocks at work are all of it."""
    return replace(
        describe_model(config().model),
        parameters=3_000_000_000,
        linear_parameters=2_800_000_000,
        hidden_size=2560,
        intermediate_size=6912,
        num_layers=36,
        num_attention_heads=20,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=39_000,
    )


def method(kind: str) -> Any:
    return config(f"method.type={kind}").method


def machine(memory: float) -> Hardware:
    return Hardware("cpu", "x86_64", 0, int(memory), 2, int(memory), False)


@pytest.mark.parametrize(
    ("kind", "memory_in_bases", "strategy"),
    [
        ("lora", 10.0, "ddp"),  # of 4 bytes a weight, and 60 % of the memory is for them
        ("lora", 1.5, "fsdp"),
        ("full", 10.0, "ddp"),
        ("full", 5.0, "deepspeed-zero2"),
        ("full", 2.5, "fsdp"),
        ("p_tuning", 1.5, "fsdp"),
        ("qlora", 10.0, "ddp"),
    ],
)
def test_auto_takes_the_simplest_that_fits(
    facts: ModelFacts, kind: str, memory_in_bases: float, strategy: Strategy
) -> None:
    here = machine(memory_in_bases * 4.0 * facts.parameters)
    chosen, why = choose(method(kind), facts, here, workers=4, here=1)
    assert chosen == strategy
    assert "each worker's" in why


def test_auto_says_that_nothing_may_fit(facts: ModelFacts) -> None:
    chosen, why = choose(method("full"), facts, machine(1.0), workers=2, here=1)
    assert chosen == "fsdp" and "may be too much" in why


def test_auto_takes_only_what_was_verified(
    facts: ModelFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {"cpu": {"ddp": ["lora"], "fsdp": []}}
    monkeypatch.setattr(strategies, "verified", lambda: seen)
    here = machine(1.5 * 4.0 * facts.parameters)
    assert choose(method("lora"), facts, here, workers=4, here=1)[0] == "ddp"
    assert choose(method("ia3"), facts, here, workers=4, here=1)[0] == "ddp"


def test_auto_on_gpus_takes_what_was_verified_there_or_says_that_nothing_was(
    facts: ModelFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = replace(machine(1.5 * 2.0 * facts.parameters), device="cuda")
    seen = {"cpu": {"ddp": ["lora"], "fsdp": ["lora"]}}
    monkeypatch.setattr(strategies, "verified", lambda: seen)
    chosen, why = choose(method("lora"), facts, gpu, workers=4, here=1)
    assert chosen == "fsdp" and why.endswith("; verified on CPUs only")
    seen["cuda"] = {"ddp": ["lora"], "fsdp": []}
    chosen, why = choose(method("lora"), facts, gpu, workers=4, here=1)
    assert chosen == "ddp" and "CPUs" not in why
    here = machine(1.5 * 4.0 * facts.parameters)
    assert choose(method("lora"), facts, here, workers=4, here=1)[0] == "fsdp"


def test_auto_knows_eight_bits_from_four(facts: ModelFacts) -> None:
    small = machine(0.5 * facts.parameters)
    four = config("method.type=qlora").method
    eight = config("method.type=qlora", "method.quantization_bit=8").method
    assert choose(four, facts, small, workers=4, here=1)[0] == "fsdp"
    assert choose(eight, facts, small, workers=4, here=1)[0] == "ddp"
    other = config("method.type=lora", "method.quantization_bit=8").method
    assert "nothing else was seen" in choose(other, facts, small, workers=4, here=1)[1]


def test_workers_of_one_machine_share_its_memory_and_each_has_its_gpu(facts: ModelFacts) -> None:
    here = machine(6.0 * 4.0 * facts.parameters)
    chosen = [choose(method("lora"), facts, here, workers=4, here=n)[0] for n in (1, 4)]
    assert chosen == ["ddp", "fsdp"]
    gpu = replace(here, device="cuda", host_memory=1)
    assert choose(method("lora"), facts, gpu, workers=4, here=4)[0] == "ddp"


def test_sharding_more_needs_less(facts: ModelFacts) -> None:
    order: list[Strategy] = ["ddp", "deepspeed-zero1", "deepspeed-zero2", "deepspeed-zero3"]
    needs = [
        sum(held(each, UnshardedBytes.of(method("full"), facts, each, "auto", "cpu"), workers=4))
        for each in order
    ]
    assert needs == sorted(needs, reverse=True) and len(set(needs)) == 4


def test_what_was_verified_names_strategies_and_methods() -> None:
    cpu = verified()["cpu"]
    assert set(cpu) == set(STRATEGIES)
    assert {"lora", "full", "qlora", "p_tuning"} <= set(cpu["ddp"])
