"""The settings to start from without any trials, which practice agrees on, each with its source.

The settings of a method are in its module in rayfin.methods, and learning rates with their sources
in rayfin.methods.rates; this module adapts them to the hardware, the model and the data.
"""

from __future__ import annotations

import math
from typing import Any

from rayfin.advisor.rules import rule_for
from rayfin.advisor.scenario import Scenario
from rayfin.errors import ConfigError, did_you_mean
from rayfin.methods import METHODS, MethodConfig
from rayfin.methods.adapted import TARGET_MODULES

__all__ = [
    "LEAST_RANK",
    "MOST_RANK",
    "STEP_SAMPLES",
    "TARGET_MODULES",
    "learning_rate",
    "learning_rate_spread",
    "lora_alpha",
    "rank",
    "settings",
    "usual_length",
]


def learning_rate(method: str, model_size_b: float | None = None) -> float:
    """Return the peak learning rate to start from with AdamW, whatever the rank.

    `model_size_b` is in billions of parameters; None means 2 to 20. Raises ConfigError for an
    unknown method.
    """
    return _checked(method).rate.at(model_size_b)


def learning_rate_spread(method: str) -> float:
    """Return the largest factor between the sources' learning rates and `learning_rate`.

    Raises ConfigError for an unknown method.
    """
    return _checked(method).rate.spread


def lora_alpha(method: str, r: int) -> float:
    """Return the alpha of a low-rank method; raises ConfigError for other methods and r below 1."""
    if (alpha := _checked(method).usual_alpha) is None:
        having = ", ".join(name for name, it in METHODS.items() if it.usual_alpha is not None)
        raise ConfigError(f"method.type={method} has no lora_alpha; those that have: {having}")
    if r < 1:
        raise ConfigError(f"method.r={r} must be 1 or more")
    return alpha


STEP_SAMPLES = 16
"""The samples of an optimizer step: QLoRA's. LoRA does worse with many, and TRL's guide to LoRA
Without Regret has fewer than 32. On a CPU, which lacks time rather than memory, they are 4:
rayfin's own default."""
_CPU_SAMPLES = 4
LEAST_RANK, MOST_RANK = 16, 128
"""The ranks between which the data decide. At 16 every method's scale is 2; 128 is the highest that
the public sweep tried, and QLoRA's is 64."""


def usual_length(hardware: str | None) -> int:
    """Return the tokens that a sample is cut at where nothing is known of the data's lengths.

    1024 is TRL's default; on a CPU 256 keep the time within reach, a convention.
    """
    return 256 if hardware == "cpu" else 1024


def rank(tokens: float | None = None, parameters_per_rank: float | None = None) -> int:
    """Return the rank of a low-rank method for so many tokens with a loss in all samples.

    An adapter learns as well as full tuning while it has at least as many parameters as there are
    such tokens (the LoRA primer of Tinker's documentation, after LoRA Without Regret);
    `parameters_per_rank` are those of an adapter of rank 1. It is a power of 2. Without either
    number it is `LEAST_RANK`, with which small data are learned as well as with any more.
    """
    if not tokens or not parameters_per_rank:
        return LEAST_RANK
    needed = 2 ** math.ceil(math.log2(tokens / parameters_per_rank))
    return int(min(MOST_RANK, max(LEAST_RANK, needed)))


def settings(scenario: Scenario, method: str, r: int = LEAST_RANK) -> dict[str, Any]:
    """Return the dotted settings for a method in a scenario, to be merged into a configuration.

    `r` is the rank of low-rank methods. The model, the data's path and the length of the training
    are not among them, and no memory is saved: `rayfin.advisor.feasibility` does where it must.
    Raises ConfigError for an unknown method.
    """
    own = _checked(method)
    length = max(8, scenario.sequence_length or usual_length(_hardware(scenario)))
    return {
        "method.type": method,
        **{f"method.{name}": value for name, value in own.usual(r, length).items()},
        **({"method.quantization_bit": 4} if own.quantized_by_default() else {}),
        "train.learning_rate": learning_rate(method, scenario.model_size_b),
        **_batch(method, scenario),
        "data.max_length": length,
    }


def _checked(method: str) -> type[MethodConfig]:
    if method not in METHODS:
        raise ConfigError(
            f"method.type: '{method}' must be one of {', '.join(METHODS)}"
            f"{did_you_mean(method, METHODS)}"
        )
    return METHODS[method]


def _hardware(scenario: Scenario) -> str:
    """Return the scenario's hardware; one that doesn't say is taken for a CPU."""
    known = scenario.hardware in ("single_gpu", "multi_gpu") or scenario.gpu_memory_gb is not None
    return "gpu" if known and scenario.hardware != "cpu" else "cpu"


def _batch(method: str, scenario: Scenario) -> dict[str, Any]:
    """Return the batch of a step, all of it at once; several GPUs share it."""
    samples = _CPU_SAMPLES if _hardware(scenario) == "cpu" else STEP_SAMPLES
    workers = 1
    if scenario.hardware == "multi_gpu":
        workers = max(1, scenario.num_gpus or 1)
    per_device = max(1, samples // workers)
    rule = rule_for(scenario)
    recomputed = rule.gradient_checkpointing and method in rule.methods
    found: dict[str, Any] = {
        "train.per_device_train_batch_size": per_device,
        # Of all workers together, which share them evenly.
        "train.gradient_accumulation_steps": workers,
        "train.gradient_checkpointing": recomputed and METHODS[method].gradient_checkpointing,
    }
    return found | ({"scaling.num_workers": workers} if workers > 1 else {})
