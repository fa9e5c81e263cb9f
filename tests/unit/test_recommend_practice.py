"""What practice recommends: within its sources, fitting the device, and valid as it stands."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise, product
from typing import Any

import pytest

from rayfin.advisor import Scenario
from rayfin.advisor.practice import (
    LEAST_RANK,
    MOST_RANK,
    STEP_SAMPLES,
    TARGET_MODULES,
    learning_rate,
    learning_rate_spread,
    lora_alpha,
    rank,
    settings,
)
from rayfin.config import (
    Config,
    TrainConfig,
    build_config,
    load_config,
    with_values,
)
from rayfin.errors import ConfigError
from rayfin.methods import METHODS
from rayfin.training.combination import check_combination
from rayfin.training.strategies import Share, share_of_step

SCENARIOS = list(
    product(("cpu", "single_gpu", "multi_gpu"), ("small", "medium", "large"), ("strict", "normal"))
)
LOW_RANK = ("lora", "qlora", "dora", "rslora", "adalora")
VIRTUAL = ("p_tuning", "prefix_tuning", "prompt_tuning")
GPU = {"hardware": "single_gpu", "data_scale": "small", "latency": "normal"}

# Method, billions of parameters, and the rate that a source named in practice.py has for it.
SOURCED = [
    *(("qlora", size, 2e-4) for size in (6.7, 13.0)),
    *(("qlora", size, 1e-4) for size in (32.5, 65.2)),
    *(("lora", size, rate) for size, rate in ((3.1, 2e-4), (1.2, 1e-3), (3.2, 1e-4))),
    *((method, 3.2, 1e-4) for method in ("dora", "rslora", "adalora")),
    *(("full", size, rate) for size, rate in ((6.7, 2e-5), (3.2, 1e-5))),
    *(("ia3", size, rate) for size, rate in ((3.2, 5e-3), (3.2, 1e-3), (1.2, 8e-3))),
    *((method, 0.56, 3e-2) for method in VIRTUAL),
    *(("p_tuning", 3.2, 1e-4), ("prefix_tuning", 3.2, 5e-3), ("prefix_tuning", 3.2, 1e-3)),
    *(("prompt_tuning", 3.2, 1e-3), ("vera", 3.2, 1e-3)),
    *((method, 3.2, 1e-4) for method in ("loha", "oft")),
]


def single(method: str, **known: Any) -> dict[str, Any]:
    return settings(Scenario(**(GPU | known)), method)


@pytest.mark.parametrize(("method", "size", "rate"), SOURCED)
def test_sources_lie_within_the_spread(method: str, size: float, rate: float) -> None:
    start, spread = learning_rate(method, size), learning_rate_spread(method)
    assert start / spread <= rate <= start * spread


def test_every_method_has_a_source() -> None:
    assert {method for method, _, _ in SOURCED} == set(METHODS)


@pytest.mark.parametrize(("size", "rate"), [(6.7, 2e-4), (13.02, 2e-4), (32.5, 1e-4), (65, 1e-4)])
def test_qlora_s_rates_are_its_paper_s(size: float, rate: float) -> None:
    assert learning_rate("qlora", size) == learning_rate("lora", size) == rate


@pytest.mark.parametrize("size", [0.1, 1.0, 7.0, 70.0, None])
def test_full_tuning_takes_a_tenth(size: float | None) -> None:
    assert learning_rate("full", size) * 10 == pytest.approx(learning_rate("lora", size))


@pytest.mark.parametrize("size", [0.1, 1.0, 7.0, 70.0, None])
def test_methods_that_train_little_take_more(size: float | None) -> None:
    most = max(learning_rate(method, size) for method in ("full", *LOW_RANK))
    assert all(learning_rate(method, size) > most for method in ("ia3", *VIRTUAL))
    assert learning_rate("dora", size) < learning_rate("lora", size)


@pytest.mark.parametrize("method", METHODS)
def test_larger_models_never_take_more(method: str) -> None:
    rates = [learning_rate(method, size) for size in (0.1, 1, 3, 7, 14, 34, 70, 400)]
    assert all(one >= other for one, other in pairwise(rates))
    assert learning_rate(method) == learning_rate(method, 7)


@pytest.mark.parametrize("r", [1, 8, 16, 64, 256])
def test_alpha_is_the_same_for_every_rank(r: int) -> None:
    assert {lora_alpha(method, r) for method in ("lora", "qlora", "dora", "adalora")} == {32}
    assert lora_alpha("rslora", r) == 8


def test_all_scales_meet_at_rank_16() -> None:
    assert lora_alpha("lora", 16) / 16 == lora_alpha("rslora", 16) / 16**0.5 == 2


@pytest.mark.parametrize(
    ("method", "r", "said"),
    [
        ("p_tuning", 8, "p_tuning has no lora_alpha.*lora, qlora"),
        ("full", 8, "full has no lora_alpha"),
        ("lora", 0, "method.r=0 must be 1 or more"),
    ],
)
def test_an_alpha_that_there_is_not(method: str, r: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        lora_alpha(method, r)


def test_a_method_that_there_is_not() -> None:
    for ask in (learning_rate, learning_rate_spread, lambda it: settings(Scenario(), it)):
        with pytest.raises(ConfigError, match=r"'loras' must be one of.*did you mean 'lora'"):
            ask("loras")


LLAMA_8B_OF_RANK_1 = 2_621_440  # 41,943,040 of an adapter of rank 16


@pytest.mark.parametrize(
    ("tokens", "r"),
    [
        (None, LEAST_RANK),
        (1_000 * 300, LEAST_RANK),  # an adapter of rank 1 would do
        (5_000 * 300, LEAST_RANK),
        (180_000 * 300, 32),  # 20.6
        (200_000 * 1000, MOST_RANK),  # 76.3
        (10**12, MOST_RANK),
    ],
)
def test_an_adapter_has_as_many_parameters_as_there_are_tokens(
    tokens: float | None, r: int
) -> None:
    assert rank(tokens, LLAMA_8B_OF_RANK_1) == r


@pytest.mark.parametrize("method", METHODS)
def test_more_memory_changes_nothing_of_what_is_learned(method: str) -> None:
    """What differs is what saves memory, and `feasibility` decides that by the estimate."""
    few = single(method, model_size_b=8.0, gpu_memory_gb=12.0)
    assert few == single(method, model_size_b=8.0, gpu_memory_gb=80.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gpu_memory_gb": 79.0, "model_size_b": 70.0, "num_gpus": 8},
        {"gpu_memory_gb": 12.0, "model_size_b": 0.1, "num_gpus": 3, "sequence_length": 3},
        {"sequence_length": 100_000, "model_size_b": 7.0, "num_gpus": 0},
    ],
    ids=["nothing more known", "large", "short", "long"],
)
def test_every_scenario_and_method_gives_a_valid_configuration(
    method: str, more: dict[str, Any]
) -> None:
    for hardware, data, latency in SCENARIOS:
        found = settings(Scenario(hardware, data, latency, **more), method)
        config = with_values(load_config(None), found)
        check_combination(config)
        assert config.method.type == method
        assert config == build_config({}, found)
        flat = config.model_dump()
        for name, value in found.items():
            section, leaf = name.split(".")
            assert flat[section][leaf] == value


@pytest.mark.parametrize("method", METHODS)
def test_over_another_method_s_configuration(method: str) -> None:
    for other in METHODS:
        base = with_values(Config(), {"method.type": other})
        assert with_values(base, settings(Scenario(**GPU), method)).method.type == method


@pytest.mark.parametrize("method", LOW_RANK)
def test_low_rank_methods_adapt_all_linear_layers(method: str) -> None:
    found = single(method, gpu_memory_gb=40.0)
    assert found["method.target_modules"] == TARGET_MODULES == "all-linear"
    assert found["method.lora_alpha"] == lora_alpha(method, 16)
    assert found["method.target_r" if method == "adalora" else "method.r"] == 16
    more = settings(Scenario(**GPU), method, r=64)
    assert more["method.target_r" if method == "adalora" else "method.r"] == 64


@pytest.mark.parametrize("method", VIRTUAL)
def test_short_samples_get_few_virtual_tokens(method: str) -> None:
    assert single(method)["method.num_virtual_tokens"] == 20
    short = single(method, sequence_length=24)
    assert (short["method.num_virtual_tokens"], short["data.max_length"]) == (12, 24)


@pytest.mark.parametrize("method", METHODS)
def test_a_cpu_gets_small_batches_of_short_samples(method: str) -> None:
    found = settings(Scenario("cpu", "large", "normal", gpu_memory_gb=80.0), method)
    assert found["train.per_device_train_batch_size"] == 4
    assert found["train.gradient_accumulation_steps"] == 1
    assert found["data.max_length"] == 256
    assert not found["train.gradient_checkpointing"]


def test_what_says_nothing_of_hardware_is_taken_for_a_cpu() -> None:
    assert settings(Scenario(), "lora") == settings(Scenario("cpu"), "lora")


def test_full_tuning_is_never_quantised() -> None:
    assert "method.quantization_bit" not in single("full", gpu_memory_gb=12.0, model_size_b=70.0)
    assert single("qlora", model_size_b=0.1)["method.quantization_bit"] == 4


@pytest.mark.parametrize(
    ("num_gpus", "parts"), [(2, (8, 2)), (4, (4, 4)), (8, (2, 8)), (3, (5, 3)), (32, (1, 32))]
)
def test_several_gpus_share_the_batch(num_gpus: int, parts: tuple[int, int]) -> None:
    scenario = Scenario("multi_gpu", "small", "normal", num_gpus=num_gpus, gpu_memory_gb=80.0)
    found = settings(scenario, "lora")
    assert found["scaling.num_workers"] == num_gpus
    assert parts == (
        found["train.per_device_train_batch_size"],
        found["train.gradient_accumulation_steps"],
    )
    assert share_of_step(TrainConfig(**training(found)), num_gpus) == Share(parts[0], 1)
    alone = single("lora", num_gpus=num_gpus)
    assert "scaling.num_workers" not in alone
    assert alone["train.per_device_train_batch_size"] == STEP_SAMPLES < 32


def training(found: dict[str, Any]) -> dict[str, Any]:
    return {k.removeprefix("train."): v for k, v in found.items() if k.startswith("train.")}


def test_the_rule_s_gradient_checkpointing() -> None:
    large = Scenario("single_gpu", "large", "normal", gpu_memory_gb=80.0, model_size_b=1.0)
    assert settings(large, "qlora")["train.gradient_checkpointing"]
    assert not settings(large, "lora")["train.gradient_checkpointing"]
    # A prefix is a cache, which recomputation drops.
    assert not METHODS["prefix_tuning"].gradient_checkpointing


def test_no_heavy_library_is_loaded() -> None:
    code = (
        "import sys\n"
        "from rayfin.advisor.practice import Scenario, settings\n"
        "settings(Scenario('cpu'), 'lora')\n"
        "print({'torch', 'transformers', 'peft', 'ray'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
