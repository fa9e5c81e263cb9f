"""What a trial takes before it runs: formulas, and how measured trials correct them."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import TypeAdapter
from transformers import PreTrainedModel

from rayfin.advisor import knowledge
from rayfin.advisor.estimate import Estimate, estimate
from rayfin.advisor.measurements import LengthFacts, MeasuredTrial, measured_from
from rayfin.advisor.memory import memory_of, teaching_memory
from rayfin.advisor.step_time import flops_per_token
from rayfin.cli import estimate as verb
from rayfin.cli.parser import Parser
from rayfin.config import Config, MethodConfig, ModelConfig, build_config
from rayfin.config.schema import Strategy
from rayfin.errors import ConfigError, UsageError
from rayfin.hardware import Hardware
from rayfin.history import History, TrialRecord
from rayfin.methods import METHODS, attach, detach
from rayfin.models import ModelFacts, describe_model, load_base, locate
from rayfin.training.sharding import UnshardedBytes, held

TINY = ModelConfig(name="tiny")
CPU = Hardware("cpu", "x86_64", 0, 16 * 2**30, 2, 16 * 2**30, False)
GPU = Hardware("cuda", "NVIDIA H100 80GB HBM3", 1, 80 * 2**30, 16, 128 * 2**30, True)
SMOLLM2 = ModelFacts(
    name="smollm2-135m",
    identity="smollm2-135m@0.1.2",
    architecture="LlamaForCausalLM",
    parameters=134_515_008,
    linear_parameters=106_168_320,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_position_embeddings=8192,
    dtype="bfloat16",
)
LARGE = replace(
    SMOLLM2,
    identity="one of 3 B",
    parameters=3_000_000_000,
    linear_parameters=2_800_000_000,
    hidden_size=2560,
    intermediate_size=6912,
    num_layers=36,
)
DATA = {
    "tokens_per_sample_mean": 256.0,
    "tokens_per_sample_p95": 256,
    "tokens_per_sample_max": 256,
    "completion_share": 0.5,
}
GB = 1e9
# SmolLM2 on two AVX2 cores, a process each: batch sizes in training and evaluation, steps, mean,
# 95th percentile and most of the samples' tokens, share of completions, measured peak in MiB.
MEASURED = [
    ("lora", 4, 16, 4, 42.0, 49, 65, 0.055, 1566),
    ("lora", 4, 16, 3, 204.5, 256, 256, 0.546, 4031),
    ("lora", 8, 16, 3, 127.6, 128, 128, 0.319, 3538),
    ("lora", 2, 4, 2, 220.6, 359, 459, 0.578, 2575),
    ("lora", 1, 2, 4, 42.0, 49, 65, 0.055, 1291),
    ("lora", 32, 16, 2, 42.0, 49, 65, 0.055, 5899),
    ("lora", 8, 8, 2, 204.5, 256, 256, 0.546, 6461),
    ("qlora", 4, 16, 3, 42.0, 49, 65, 0.057, 1296),
    ("qlora", 4, 16, 2, 206.3, 256, 256, 0.549, 3455),
    ("qlora", 2, 4, 1, 220.7, 322, 459, 0.578, 2479),
    ("qlora", 1, 2, 3, 42.0, 49, 65, 0.057, 980),
    ("qlora", 32, 16, 1, 42.0, 49, 65, 0.057, 5942),
    ("qlora", 8, 16, 2, 127.3, 128, 128, 0.314, 3228),
    ("qlora", 8, 8, 1, 206.3, 256, 256, 0.549, 6189),
    ("p_tuning", 4, 16, 3, 42.0, 49, 65, 0.057, 1432),
    ("p_tuning", 4, 16, 2, 206.3, 256, 256, 0.549, 2694),
    ("p_tuning", 2, 4, 1, 220.7, 322, 459, 0.578, 2029),
    ("p_tuning", 1, 2, 3, 42.0, 49, 65, 0.057, 1291),
    ("p_tuning", 32, 16, 1, 42.0, 49, 65, 0.057, 3717),
    ("p_tuning", 8, 16, 2, 127.3, 128, 128, 0.314, 2744),
    ("p_tuning", 8, 8, 1, 206.3, 256, 256, 0.549, 4237),
]


# The same, of two workers with two batches of 4 a step: the larger of their peaks in MiB.
MEASURED_WORKERS = [
    ("lora", "ddp", 1975),
    ("lora", "fsdp", 2903),
    ("lora", "deepspeed-zero1", 1611),
    ("lora", "deepspeed-zero2", 1629),
    ("lora", "deepspeed-zero3", 2813),
    ("full", "ddp", 3915),
    ("full", "fsdp", 3975),
    ("full", "deepspeed-zero1", 3957),
    ("full", "deepspeed-zero2", 3645),
    ("full", "deepspeed-zero3", 4285),
]


# The same of methods whose formulas were made without trials: batches of 4, samples of at most 65
# tokens, share of completions 0.0575.
MEASURED_ALONE = [("vera", 1485), ("loha", 2452), ("oft", 1444)]


def config(**overrides: Any) -> Config:
    """`method__r=4` is method.r=4."""
    named = {key.replace("__", ".", 1): value for key, value in overrides.items()}
    return build_config({"method": {"type": "lora"}}, named)


def record(
    peak: float | None,
    *,
    number: int = 0,
    seconds: float | None = None,
    facts: ModelFacts = SMOLLM2,
    hardware: Hardware = CPU,
    data: dict[str, Any] = DATA,
    **overrides: Any,
) -> TrialRecord:
    """A finished trial, as rayfin writes it; each `number` is a computation of its own."""
    overrides.setdefault("train__seed", number)
    sections = config(**overrides).model_dump(mode="json")
    metrics = {"eval_loss": 2.0, "steps": 10, "peak_memory_bytes": peak, "train_seconds": seconds}
    time = datetime(2026, 1, 1, tzinfo=UTC)
    return TrialRecord(
        trial_id=f"train-{number}",
        sweep_id="train",
        fingerprint=f"f{number}",
        status="finished",
        created_at=time,
        updated_at=time,
        spec={name: sections[name] for name in ("model", "data", "method", "train")},
        scenario={
            "model": facts.as_dict(),
            "hardware": hardware.as_dict() | {"num_workers": 1},
            "data": dict(data),
        },
        metrics={name: value for name, value in metrics.items() if value is not None},
    )


def formula(**overrides: Any) -> float:
    """Bytes by formula of a trial like those of `record`."""
    parts = memory_of(config(**overrides), SMOLLM2, device="cpu", tokens=256, completion_share=0.5)
    return parts.total


def estimated(records: list[TrialRecord], hardware: Hardware = CPU, **overrides: Any) -> Estimate:
    return estimate(
        config(**overrides), SMOLLM2, hardware, measured=measured_from(records), tokens=256
    )


def width(found: Estimate) -> float:
    return math.log(found.memory.high / found.memory.low)


# --- the rule of thumb ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("billions", "method", "weights", "gradients", "optimizer", "activations", "total"),
    [
        (7, "full", 14, 14, 56, 7, 91),
        (7, "lora", 14, 0.14, 0.56, 2.8, 17.5),
        (7, "qlora", 3.5, 0.14, 0.56, 2.1, 6.3),
        (13, "full", 26, 26, 104, 13, 169),
        (13, "lora", 26, 0.26, 1.04, 5.2, 32.5),
        (13, "qlora", 6.5, 0.26, 1.04, 3.9, 11.7),
        (70, "full", 140, 140, 560, 70, 910),
        (70, "lora", 140, 1.4, 5.6, 28, 175),
        (70, "qlora", 35, 1.4, 5.6, 21, 63),
    ],
)
def test_the_teaching_formula(
    billions: float,
    method: Literal["full", "lora", "qlora"],
    weights: float,
    gradients: float,
    optimizer: float,
    activations: float,
    total: float,
) -> None:
    parts = teaching_memory(billions * 1e9, method)
    assert parts.weights == pytest.approx(weights * GB)
    assert parts.gradients == pytest.approx(gradients * GB)
    assert parts.optimizer == pytest.approx(optimizer * GB)
    assert parts.activations == pytest.approx(activations * GB)
    assert parts.total == pytest.approx(total * GB)


@pytest.mark.parametrize("parameters", [0, -7e9, math.nan, math.inf])
def test_the_teaching_formula_refuses_what_is_no_number_of_parameters(parameters: float) -> None:
    with pytest.raises(ConfigError, match=r"parameters=.* must be a positive number"):
        teaching_memory(parameters, "lora")


def test_the_teaching_formula_knows_three_methods() -> None:
    with pytest.raises(ConfigError, match="'ia3' must be one of full, lora, qlora"):
        teaching_memory(7e9, "ia3")  # type: ignore[arg-type]


# --- parameters -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    return describe_model(TINY)


@pytest.fixture(scope="module")
def base() -> Iterator[PreTrainedModel]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_base(TINY, None, "cpu")
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "settings",
    [
        {"type": "lora", "r": 4},
        {"type": "lora", "target_modules": ["q_proj", "down_proj"]},
        {"type": "lora", "target_modules": ["layers.1.self_attn.v_proj", "mlp.up_proj"]},
        {"type": "qlora", "r": 16},
        {"type": "dora"},
        {"type": "rslora"},
        {"type": "adalora", "init_r": 6, "target_r": 2},
        {"type": "ia3"},
        {"type": "ia3", "target_modules": ["q_proj", "down_proj"]},
        {
            "type": "ia3",
            "target_modules": ["q_proj", "up_proj", "down_proj"],
            "feedforward_modules": ["up_proj"],
        },
        {"type": "lora", "modules_to_save": ["lm_head", "lm_head"]},
        {"type": "lora", "modules_to_save": ["embed_tokens", "model.embed_tokens"]},
        {"type": "lora", "modules_to_save": ["self_attn.q_proj", "q_proj"]},
        {"type": "lora", "modules_to_save": ["layers.0.self_attn.q_proj", "model.norm"]},
        {
            "type": "lora",
            "target_modules": ["layers.1.self_attn.q_proj", "q_proj", "mlp.up_proj"],
            "modules_to_save": ["model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"],
        },
        {"type": "vera", "r": 8, "modules_to_save": ["layers.0.input_layernorm", "o_proj"]},
        {"type": "p_tuning"},
        {"type": "p_tuning", "num_virtual_tokens": 5, "encoder_hidden_size": 32},
        {"type": "p_tuning", "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 3},
        {"type": "prefix_tuning"},
        {"type": "prefix_tuning", "prefix_projection": True},
        {"type": "prefix_tuning", "prefix_projection": True, "encoder_hidden_size": 24},
        {"type": "prompt_tuning", "num_virtual_tokens": 7},
        {"type": "full"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_parameters_are_those_that_peft_trains(
    settings: dict[str, Any], base: PreTrainedModel, facts: ModelFacts
) -> None:
    method: MethodConfig = TypeAdapter(MethodConfig).validate_python(settings)
    model = attach(base, method, 20, locate(TINY))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    detach(model)
    base.requires_grad_(False)
    assert method.trained_parameters(facts) == trained


@pytest.mark.parametrize(
    ("architecture", "settings", "trained"),
    [
        # GPT-2 small, r=8: c_attn 768 + 2304, c_proj 768 + 768, c_fc and c_proj 768 + 3072.
        ("GPT2LMHeadModel", {"type": "lora", "r": 8}, 12 * 8 * (3072 + 1536 + 3840 + 3840)),
        ("GPT2LMHeadModel", {"type": "lora", "target_modules": ["c_proj"]}, 12 * 8 * 5376),
        ("GPT2LMHeadModel", {"type": "ia3"}, 12 * (2304 + 3072)),
        ("OPTForCausalLM", {"type": "lora", "r": 2}, 12 * 2 * (4 * 1536 + 2 * 3840)),
        ("OPTForCausalLM", {"type": "ia3"}, 12 * (768 + 768 + 3072)),
        ("OPTForCausalLM", {"type": "lora", "target_modules": ["lm_head"]}, 8 * (768 + 49152)),
        ("Qwen2ForCausalLM", {"type": "ia3"}, 12 * (768 + 768 + 3072)),
    ],
)
def test_parameters_of_other_architectures(
    architecture: str, settings: dict[str, Any], trained: int
) -> None:
    blocks = 12 * (4 * 768**2 + 2 * 768 * 3072)
    other = replace(
        SMOLLM2,
        architecture=architecture,
        linear_parameters=blocks,
        hidden_size=768,
        intermediate_size=3072,
        num_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
    )
    method: MethodConfig = TypeAdapter(MethodConfig).validate_python(settings)
    assert method.trained_parameters(other) == trained


# --- the formula ------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_an_estimate(method: str, device: Literal["cpu", "cuda"]) -> None:
    parts = asdict(memory_of(config(method__type=method), SMOLLM2, device=device))
    assert all(0 <= part < 100 * GB for part in parts.values())
    assert parts["weights"] > 0 and parts["gradients"] > 0 and parts["activations"] > 0


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"method__r": 8}, {"method__r": 64}),
        ({"train__per_device_train_batch_size": 8}, {"train__per_device_train_batch_size": 16}),
        ({"data__max_length": 256}, {"data__max_length": 512}),
        ({"train__gradient_checkpointing": True}, {"train__gradient_checkpointing": False}),
        ({"method__type": "qlora"}, {"method__type": "lora"}),
        ({"method__quantization_bit": 4}, {"method__quantization_bit": 8}),
        ({"method__quantization_bit": 8}, {}),
        ({"method__type": "p_tuning"}, {}),
        ({}, {"method__type": "dora"}),
        ({"method__target_modules": ["q_proj"]}, {}),
        ({"model__dtype": "bfloat16"}, {"model__dtype": "float32"}),
        (
            {"train__per_device_train_batch_size": 1},
            {"train__per_device_train_batch_size": 1, "method__type": "full"},
        ),
        ({"train__per_device_eval_batch_size": 64}, {"train__per_device_eval_batch_size": 128}),
        (  # as many samples on each worker
            {"scaling__num_workers": 1},
            {"scaling__num_workers": 2, "train__gradient_accumulation_steps": 2},
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_more_takes_more_memory(
    less: dict[str, Any], more: dict[str, Any], device: Literal["cpu", "cuda"]
) -> None:
    usual = {"train__per_device_train_batch_size": 8, "train__per_device_eval_batch_size": 8}
    small, large = (
        memory_of(config(**usual | settings), SMOLLM2, device=device).total
        for settings in (less, more)
    )
    assert small < large


def test_the_longest_sample_counts_and_no_more_than_max_length() -> None:
    def total(tokens: int | None) -> float:
        return memory_of(
            config(train__per_device_train_batch_size=8), SMOLLM2, device="cpu", tokens=tokens
        ).total

    assert total(128) < total(256) == total(9999) == total(None)


def test_weights_in_four_bits_carry_their_constants() -> None:
    # 0.5 bytes a weight, 1/64 for the constants and 4/(64*256) for theirs; the embedding whole.
    parts = memory_of(config(method__type="qlora"), SMOLLM2, device="cuda")
    assert parts.weights == pytest.approx(
        106_168_320 * (0.5 + 0.015625 + 0.000244140625) + 2 * (134_515_008 - 106_168_320)
    )


def test_full_fine_tuning_is_float32_and_has_no_adapter() -> None:
    parts = memory_of(config(method__type="full"), SMOLLM2, device="cuda")
    assert parts.weights == parts.gradients == 4 * 134_515_008
    assert parts.optimizer == 8 * 134_515_008
    assert parts.adapter == 0


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora"])
def test_the_first_matrices_that_were_taken_out_of_the_base_are_counted_on_cpu(init: str) -> None:
    def adapter(init: str, device: Literal["cpu", "cuda"]) -> float:
        settings = config(method__init_lora_weights=init)
        return memory_of(settings, SMOLLM2, device=device).adapter

    assert adapter(init, "cpu") == 2 * adapter("eva", "cpu") > 0
    assert adapter(init, "cuda") == adapter("eva", "cuda")  # in the host's memory, not the GPU's


# Gigabytes of 7.5 B parameters on 64 GPUs in 16 bits: figure 1 of the ZeRO paper. The rest is of
# DeepSpeed's own: its bucket, and for stage 3 the weights that it keeps gathered.
BILLIONS, OWN = 7.5e9, 2 * 5e8 + 4 * 7.5e9 / 64


@pytest.mark.parametrize(
    ("strategy", "published", "own"),
    [
        ("deepspeed-zero1", 31.4, OWN),
        ("deepspeed-zero2", 16.6, OWN),
        ("deepspeed-zero3", 1.9, OWN + 2 * 1e9),
    ],
)
def test_zero_holds_what_its_paper_says(strategy: Strategy, published: float, own: float) -> None:
    whole = UnshardedBytes(2 * BILLIONS, 0.0, 32, BILLIONS, full=True, computed=2)
    found = sum(held(strategy, whole, workers=64, offload=False))
    assert (found - own) / GB == pytest.approx(published, abs=0.05)


def test_fsdp_holds_its_part_and_two_blocks() -> None:
    """A 70 B model of 80 blocks in 4 bits on 8 GPUs, its embeddings in 16, with a large adapter."""
    whole = UnshardedBytes(linear=36e9, rest=4e9, layers=80, trained=8e8, full=False, computed=2)
    one = held("fsdp", whole, workers=8, offload=False)
    assert one.weights / GB == pytest.approx(40 / 8 + 2 * 36 / 80 + 4)
    assert one.adapter / GB == 3.2
    assert held("fsdp", whole, workers=8, offload=True).weights / GB == pytest.approx(4.9)
    everything = held("ddp", whole, workers=8, offload=False)
    assert everything.weights == 40 * GB and everything[1:] == one[1:]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_more_is_shared_the_less_a_worker_holds(device: Literal["cpu", "cuda"]) -> None:
    def total(strategy: Strategy, workers: int = 8, offload: bool = False) -> float:
        shared = config(
            method__type="full",
            train__per_device_train_batch_size=8,
            scaling__num_workers=workers,
            scaling__strategy=strategy,
            scaling__cpu_offload=offload,
        )
        return memory_of(shared, LARGE, device=device, tokens=16).total

    order: list[Strategy] = ["ddp", "deepspeed-zero1", "deepspeed-zero2", "deepspeed-zero3"]
    totals = [total(strategy) for strategy in order]
    # Whoever shards weights on CPU has had them whole, and keeps that memory: measured, too.
    fewer = totals if device == "cuda" else totals[:3]
    assert fewer == sorted(fewer, reverse=True) and len(set(fewer)) == len(fewer)
    assert totals[3] < totals[0]
    for strategy in (*order[1:], "fsdp"):
        assert total(strategy, workers=8) < total(strategy, workers=2)
        if device == "cuda":
            assert total(strategy, offload=True) < total(strategy)


@pytest.mark.parametrize(("method", "strategy", "peak"), MEASURED_WORKERS)
def test_what_workers_took_is_within_what_the_formula_allows(
    method: str, strategy: Strategy, peak: int
) -> None:
    settings = config(
        method__type=method,
        data__max_length=128,
        scaling__num_workers=2,
        scaling__strategy=strategy,
        train__per_device_train_batch_size=4,
        train__per_device_eval_batch_size=4,
        train__gradient_accumulation_steps=2,
        train__max_steps=3,
    )
    found = estimate(settings, SMOLLM2, CPU, profile=LengthFacts(41.983, 49, 65, 0.055))
    assert found.memory.low < peak * 2**20 < found.memory.high


@pytest.mark.parametrize(("method", "peak"), MEASURED_ALONE)
def test_formulas_alone_are_near_what_was_measured(method: str, peak: int) -> None:
    settings = config(
        method__type=method,
        train__per_device_train_batch_size=4,
        train__per_device_eval_batch_size=4,
    )
    parts = memory_of(settings, SMOLLM2, device="cpu", tokens=65, completion_share=0.0575)
    assert parts.total == pytest.approx(peak * 2**20, rel=0.06)


def test_what_strategy_auto_takes_is_told_with_its_memory() -> None:
    wide = {"scaling__num_workers": 4, "train__per_device_train_batch_size": 4}
    small = replace(GPU, device_memory=9 * 2**30)
    found = estimate(config(method__type="full", **wide), LARGE, small, tokens=16)
    named = estimate(
        config(method__type="full", scaling__strategy="fsdp", **wide), LARGE, small, tokens=16
    )
    assert found.strategy == "fsdp" and "9.7 GB" in str(found.strategy_why)
    assert found.memory == named.memory and named.strategy_why == "asked for"
    assert estimate(config(), SMOLLM2, CPU).strategy is None


def test_workers_without_gpus_share_the_memory_and_the_cores() -> None:
    two = {"scaling__num_workers": 2, "train__per_device_train_batch_size": 8}
    alone = estimate(config(train__per_device_train_batch_size=4), SMOLLM2, CPU, tokens=64)
    shared = estimate(config(**two), SMOLLM2, CPU, tokens=64)
    assert shared.room == alone.room / 2
    assert shared.seconds.expected > 1.5 * alone.seconds.expected
    gpus = [estimate(config(**two), SMOLLM2, GPU), estimate(config(), SMOLLM2, GPU)]
    assert gpus[0].room == gpus[1].room


def test_only_trials_that_were_shared_alike_correct() -> None:
    def trial(number: int, **hardware: Any) -> TrialRecord:
        row = record(2.0 * formula(), number=number)
        scenario = row.scenario | {"hardware": row.scenario["hardware"] | hardware}
        return row.model_copy(update={"scenario": scenario})

    alone = [trial(number) for number in range(3)]
    group = [trial(3 + n, num_workers=2, strategy="fsdp", cpu_offload=False) for n in range(2)]
    settings = {"scaling__num_workers": 2, "scaling__strategy": "fsdp"}
    assert estimated(alone, **settings).trials == 0
    assert estimated(alone + group, **settings).trials == 2
    assert estimated(alone + group) == estimated(alone)
    offloaded = measured_from([trial(9, num_workers=2, strategy="fsdp", cpu_offload=True)])
    assert offloaded[0].config.scaling.cpu_offload


def test_flops_are_six_or_four_a_parameter() -> None:
    weights = SMOLLM2.linear_parameters + SMOLLM2.vocab_size * SMOLLM2.hidden_size
    full = flops_per_token(config(method__type="full"), SMOLLM2, length=1)
    prompt = flops_per_token(config(method__type="prompt_tuning"), SMOLLM2, length=1)
    again = flops_per_token(
        config(method__type="prompt_tuning", train__gradient_checkpointing=True), SMOLLM2, length=1
    )
    assert full / weights == pytest.approx(6, rel=0.01)
    assert prompt / weights == pytest.approx(4, rel=0.01)
    assert again / weights == pytest.approx(6, rel=0.01)
    assert flops_per_token(config(), SMOLLM2, length=1) > prompt


# --- the correction ---------------------------------------------------------------------------


def test_without_trials_the_formula_stands_with_a_wide_interval() -> None:
    found = estimated([])
    assert found.memory.expected == pytest.approx(found.parts.total)
    assert found.trials == found.near_trials == 0
    assert found.memory.high / found.memory.low > 1.5
    assert found.seconds.high / found.seconds.low > 5


def test_trials_correct_the_estimate_and_narrow_it() -> None:
    factor = 1.4
    before = estimated([])
    estimates = [
        estimated([record(factor * formula(), number=n) for n in range(count)])
        for count in (1, 3, 10)
    ]
    errors = [abs(found.memory.expected / (factor * before.parts.total) - 1) for found in estimates]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.25 and errors[-1] < 0.05
    assert width(estimates[-1]) < width(estimates[1]) < width(before)
    assert estimates[-1].memory.low < factor * before.parts.total < estimates[-1].memory.high
    assert estimates[-1].trials == estimates[-1].near_trials == 10


@pytest.mark.parametrize("left_out", range(len(MEASURED)), ids=lambda row: str(MEASURED[row][:2]))
def test_measured_trials_are_foreseen_within_a_quarter(left_out: int) -> None:
    def measured(row: int) -> MeasuredTrial:
        method, batch, eval_batch, steps, mean, p95, most, share, peak = MEASURED[row]
        lengths = {
            "tokens_per_sample_mean": mean,
            "tokens_per_sample_p95": p95,
            "tokens_per_sample_max": most,
            "completion_share": share,
        }
        trial = record(
            peak * 2**20,
            number=row,
            data=lengths,
            method__type=method,
            data__max_length=512,
            train__per_device_train_batch_size=batch,
            train__per_device_eval_batch_size=eval_batch,
            train__max_steps=steps,
        )
        return measured_from([trial])[0]

    this = measured(left_out)
    others = [measured(row) for row in range(len(MEASURED)) if row != left_out]
    found = estimate(this.config, SMOLLM2, CPU, measured=others, profile=this.lengths)
    assert found.memory.expected == pytest.approx(this.peak_memory_bytes, rel=0.25)


def test_trials_that_disagree_leave_it_wide() -> None:
    agreeing = estimated([record(1.2 * formula(), number=n) for n in range(10)])
    scattered = estimated([record((0.9, 1.6)[n % 2] * formula(), number=n) for n in range(10)])
    assert width(agreeing) < 0.5 * width(scattered)


def test_near_trials_count_for_more_than_many_far_ones() -> None:
    near = [record(1.3 * formula(), number=n) for n in range(5)]
    far = [
        record(0.8 * formula(method__type="dora"), number=10 + n, method__type="dora")
        for n in range(100)
    ]
    found = estimated(near + far)
    assert found.memory.expected == pytest.approx(1.3 * found.parts.total, rel=0.1)
    assert (found.trials, found.near_trials) == (105, 5)


def test_far_trials_help_where_there_is_no_near_one() -> None:
    far = [
        record(1.3 * formula(method__type="dora"), number=n, method__type="dora") for n in range(10)
    ]
    found = estimated(far)
    assert 1.1 < found.memory.expected / found.parts.total <= 1.3
    assert found.near_trials == 0


def test_another_kind_of_device_says_nothing() -> None:
    assert estimated([record(2 * formula(), hardware=GPU)]) == estimated([])


def test_time_is_learned_from_the_same_machine() -> None:
    before = estimated([])
    slow = [record(None, number=n, seconds=1000.0) for n in range(10)]
    after = estimated(slow)
    assert after.seconds.expected > 3 * before.seconds.expected
    assert after.seconds.high / after.seconds.low < before.seconds.high / before.seconds.low
    assert after.memory == before.memory


def test_time_grows_with_the_work() -> None:
    base_line = estimated([]).seconds.expected
    assert estimated([], train__max_steps=120).seconds.expected == pytest.approx(2 * base_line)
    assert estimated([], train__gradient_accumulation_steps=2).seconds.expected > 1.9 * base_line
    assert estimated([], GPU).seconds.expected < base_line


def test_cost_is_hours_times_the_price() -> None:
    found = estimate(config(), SMOLLM2, CPU, price_per_hour=7.2)
    assert found.cost is not None
    assert found.cost.high == pytest.approx(found.seconds.high * 0.002)
    assert estimate(config(), SMOLLM2, CPU).cost is None


@pytest.mark.parametrize(("room", "fits"), [(64.0, True), (1.0, None), (0.1, False)])
def test_what_fits(room: float, fits: bool | None) -> None:
    total = memory_of(config(), SMOLLM2, device="cpu").total
    hardware = replace(CPU, device_memory=int(room * total))
    assert estimate(config(), SMOLLM2, hardware).fits is fits


# --- hostile histories ------------------------------------------------------------------------


def changed(section: str, **values: Any) -> dict[str, Any]:
    """A record's fields as JSON, with `values` in one of them."""
    fields: dict[str, Any] = record(2 * formula()).model_dump()
    place = fields
    for part in section.split("."):
        place = place[part]
    place.update(values)
    return fields


@pytest.mark.parametrize(
    "fields",
    [
        changed("metrics", peak_memory_bytes=math.nan),
        changed("metrics", peak_memory_bytes=math.inf),
        changed("metrics", peak_memory_bytes=-1),
        changed("metrics", peak_memory_bytes="2 GB"),
        changed("metrics", peak_memory_bytes=True),
        changed("metrics", peak_memory_bytes=None),
        changed("metrics", peak_memory_bytes=1),
        changed("metrics", peak_memory_bytes=1e30),
        changed("metrics", peak_memory_bytes=10**400),
        changed("spec.train", learning_rate=1e308),
        changed("spec.train", learning_rate=math.nan),
        changed("spec.method", r=-3),
        changed("spec.method", r=10**400),
        changed("spec.method", type="magic"),
        changed("spec", method=None),
        changed("spec", train=[]),
        changed("scenario", source="csv"),
        changed("scenario", model=None),
        changed("scenario", hardware="a laptop"),
        changed("scenario", data={}),
        changed("scenario.model", hidden_size=0),
        changed("scenario.model", num_layers=10**400),
        changed("scenario.model", identity=None),
        changed("scenario.hardware", device="tpu"),
        changed("scenario.hardware", num_workers=0),
        changed("scenario.data", completion_share=math.nan),
        changed("scenario.data", tokens_per_sample_max=-5),
        {**changed("spec"), "spec": {}},
        {**changed("spec"), "scenario": {}},
        {**changed("spec"), "status": "failed"},
        {**changed("spec"), "status": "oom"},
        {**changed("spec"), "status": "running"},
    ],
    ids=itertools.count(),
)
def test_a_row_that_cannot_be_used_changes_nothing(fields: dict[str, Any]) -> None:
    # Past the record's own validation: a history may hold what an older or other program wrote.
    hostile = TrialRecord.model_construct(**fields)
    good = [record(1.3 * formula(), number=n) for n in range(1, 5)]
    assert estimated([hostile, *good]).memory == estimated(good).memory


def test_duplicates_count_once() -> None:
    good = [record(1.3 * formula(), number=n) for n in range(5)]
    wrong = record(4 * formula(), number=5)
    copies = [wrong.model_copy(update={"trial_id": f"copy-{n}"}) for n in range(20_000)]
    assert len(measured_from(copies)) == 1
    assert estimated([*good, *copies]) == estimated([*good, wrong])


def test_one_wrong_measurement_does_not_sway() -> None:
    good = [record(1.1 * formula(), number=n) for n in range(6)]
    found = estimated([*good, record(20 * formula(), number=6)])
    assert found.memory.expected == pytest.approx(1.1 * found.parts.total, rel=0.15)


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("price", [-1.0, math.nan, math.inf])
def test_a_price_is_a_number(price: float) -> None:
    with pytest.raises(ConfigError, match=r"price_per_hour=.* must be 0 or more"):
        estimate(config(), SMOLLM2, CPU, price_per_hour=price)


@pytest.mark.parametrize("tokens", [0, -1])
def test_tokens_are_counted_from_one(tokens: int) -> None:
    with pytest.raises(ConfigError, match=f"tokens={tokens} must be 1 or more"):
        memory_of(config(), SMOLLM2, device="cpu", tokens=tokens)
    with pytest.raises(ConfigError, match=f"tokens={tokens} must be 1 or more"):
        estimate(config(), SMOLLM2, CPU, tokens=tokens)


@pytest.mark.parametrize("share", [0, 1.1, math.nan])
def test_a_share_is_between_0_and_1(share: float) -> None:
    with pytest.raises(ConfigError, match=r"completion_share=.* must be above 0 and at most 1"):
        memory_of(config(), SMOLLM2, device="cpu", completion_share=share)


# --- the command ------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    parser = Parser(prog="rayfin")
    verb.register(parser.add_subparsers())
    args = parser.parse_args(["estimate", *arguments])
    code: int = args.handler(args)
    return code


SMALL = ("model.name=tiny", "data.path=pydocs", "data.max_samples=40", "method.type=lora")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the trials that come with rayfin."""
    monkeypatch.setattr(knowledge, "_reference", lambda: b"")


def test_trials_that_come_with_rayfin_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*SMALL, f"storage={tmp_path / 'runs'}", "--json", "scaling.use_gpu=false") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["near_trials"] > 10
    assert found["memory"]["high"] < 2 * found["memory"]["low"]


@pytest.mark.usefixtures("alone")
def test_the_command_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = tmp_path / "runs"
    assert run(*SMALL, f"storage={storage}", "--json", "--price-per-hour", "3") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["low"] < found["memory"]["expected"] < found["memory"]["high"]
    assert found["cost"]["expected"] == pytest.approx(found["seconds"]["expected"] * 3 / 3600)
    assert found["trials"] == 0
    assert not storage.exists()


@pytest.mark.usefixtures("alone")
def test_the_command_reads_the_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{tmp_path / 'h.sqlite'}"
    here = describe_model(TINY)
    with History.open(url) as history:
        for number in range(3):
            row = record(1e9, number=number, facts=here, model__name="tiny")
            history.put(row)
    assert run(*SMALL, f"history={url}", "scaling.use_gpu=false") == 0
    shown = capsys.readouterr().out
    assert "corrected by 3 measured trials, 3 of them of this model and method" in shown
    assert "peak memory" in shown and "training time" in shown
    assert "evaluations and answers are not counted" in shown


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("method.type=full method.quantization_bit=4", "quantization_bit=4 can't work with method"),
        ("method.type=lora train.optim=paged_adamw_8bit", "paged_adamw_8bit needs a GPU"),
        ("method.type=lora method.init_from=support@9", "there is no registry of adapters"),
        ("method.type=lora method.init_from=./nosuch", "'./nosuch' is neither NAME@VERSION"),
    ],
)
def test_the_command_refuses_what_training_would(settings: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        run("model.name=tiny", *settings.split(), f"storage={tmp_path}", "--hardware", "cpu")


def test_a_setting_for_gpus_may_be_estimated_for_one(tmp_path: Path) -> None:
    optim = "train.optim=paged_adamw_8bit"
    assert run(*SMALL, optim, f"storage={tmp_path}", "--hardware", "single_gpu", "--json") == 0
