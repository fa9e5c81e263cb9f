"""Settings that practice agrees on, each with its source: where to start without any trials.

What a method starts from is in its module in rayfin.methods, learning rates and their sources in
rayfin.methods.rates; here is what the hardware, the model and the data make of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rayfin.advisor.rules import rule_for
from rayfin.advisor.scenario import Scenario
from rayfin.errors import ConfigError, did_you_mean
from rayfin.methods import METHODS, MethodConfig
from rayfin.methods.adapted import TARGET_MODULES

__all__ = [
    "CPU_CLASS",
    "MEMORY_CLASSES",
    "TARGET_MODULES",
    "MemoryClass",
    "learning_rate",
    "learning_rate_spread",
    "lora_alpha",
    "memory_class",
    "rank",
    "settings",
]


def learning_rate(method: str, model_size_b: float | None = None) -> float:
    """The peak rate to start from, for AdamW, whatever the rank; ConfigError for another method.

    `model_size_b` is in billions of parameters; None takes the rate of 2 to 20.
    """
    return _checked(method).rate.at(model_size_b)


def learning_rate_spread(method: str) -> float:
    """Sources' rates are at most this factor above or below; ConfigError for another method."""
    return _checked(method).rate.spread


def lora_alpha(method: str, r: int) -> float:
    """The alpha of a low-rank method; raises ConfigError for another one and for r below 1."""
    if (alpha := _checked(method).usual_alpha) is None:
        having = ", ".join(name for name, it in METHODS.items() if it.usual_alpha is not None)
        raise ConfigError(f"method.type={method} has no lora_alpha; those that have: {having}")
    if r < 1:
        raise ConfigError(f"method.r={r} must be 1 or more")
    return alpha


@dataclass(frozen=True)
class MemoryClass:
    """What a device of this much memory is given to do."""

    gib: float
    """Memory of one GPU as it is sold; 0 for a CPU."""
    r: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    max_length: int
    """Tokens of a sample, where the scenario doesn't say."""
    gradient_checkpointing: bool
    quantise_above_b: float
    """Billions of parameters above which the base model is loaded in 4 bits."""

    @property
    def batch_size(self) -> int:
        """Samples of an optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


MEMORY_CLASSES = (
    MemoryClass(80, 64, 8, 2, 4096, False, 20.0),
    MemoryClass(40, 32, 8, 2, 2048, False, 10.0),
    MemoryClass(24, 16, 4, 4, 1024, True, 6.0),
    MemoryClass(12, 8, 1, 16, 512, True, 3.0),
)
"""GPUs, the largest first.

16 samples a step are QLoRA's, as is the smallest GPU's way to them, 1 by 16; LoRA does worse with
many, and TRL's guide to LoRA Without Regret has fewer than 32. Above `quantise_above_b` weights in
16 bits would take half of the memory. The highest rank is QLoRA's 64; that guide has 256 for data
that outgrow the adapter. How rank, length (TRL's default is 1024) and batch fall with the memory is
a convention, nothing measured.
"""
CPU_CLASS = MemoryClass(0, 8, 4, 1, 256, False, 3.0)
"""A CPU, whose time is shorter than its memory: rayfin's own defaults, a convention."""

_SOLD = 0.9
"""A GPU shows less than it is sold as: some of 24 GB show 22 GiB."""


def memory_class(gpu_memory_gb: float | None) -> MemoryClass:
    """The largest class that is no larger than the GPU's GiB, else the smallest; None is a CPU."""
    if gpu_memory_gb is None:
        return CPU_CLASS
    fitting = (it for it in MEMORY_CLASSES if gpu_memory_gb >= _SOLD * it.gib)
    return next(fitting, MEMORY_CLASSES[-1])


def rank(gpu_memory_gb: float | None) -> int:
    """The rank of a low-rank method's update, by the GiB of a GPU; None is a CPU."""
    return memory_class(gpu_memory_gb).r


_BYTES, _BYTES_4BIT = 2.0, 0.5
_BYTES_FULL = _BYTES + 2 + 8
"""A parameter that is trained: with its gradient and Adam's two moments."""


def settings(scenario: Scenario, method: str) -> dict[str, Any]:
    """Dotted settings for `method` in `scenario`, to be laid over any configuration.

    The model, the data's path and the number of steps are not among them. Raises ConfigError for a
    method that there is not.
    """
    own, place = _checked(method), _place(scenario)
    length = max(8, scenario.sequence_length or place.max_length)
    usual = own.usual(place.r, length)
    return {
        "method.type": method,
        **{f"method.{name}": value for name, value in usual.items()},
        **({"method.quantization_bit": 4} if _quantised(method, scenario, place) else {}),
        "train.learning_rate": learning_rate(method, scenario.model_size_b),
        **_batch(method, scenario, place, length),
        "data.max_length": length,
    }


def _checked(method: str) -> type[MethodConfig]:
    if method not in METHODS:
        raise ConfigError(
            f"method.type: '{method}' must be one of {', '.join(METHODS)}"
            f"{did_you_mean(method, METHODS)}"
        )
    return METHODS[method]


def _place(scenario: Scenario) -> MemoryClass:
    if scenario.hardware == "cpu":
        return CPU_CLASS
    if scenario.gpu_memory_gb is None and scenario.hardware in ("single_gpu", "multi_gpu"):
        return MEMORY_CLASSES[-1]
    return memory_class(scenario.gpu_memory_gb)


def _quantised(method: str, scenario: Scenario, place: MemoryClass) -> bool:
    large = (scenario.model_size_b or 0) > place.quantise_above_b
    own = METHODS[method]
    return own.quantized_by_default() or (large and own.quantized_base)


def _batch(method: str, scenario: Scenario, place: MemoryClass, length: int) -> dict[str, Any]:
    """The class's batch in smaller parts where the model or long samples leave it no room.

    Halved where the weights take more than a quarter of the memory and again for more than half: a
    convention, nothing measured. Several GPUs share what one would do.
    """
    filled = _filled(method, scenario, place)
    crowd = 1 if filled <= 1 / 4 else 2 if filled <= 1 / 2 else 4
    times = math.ceil(length / place.max_length)
    workers = 1
    if scenario.hardware == "multi_gpu":
        workers = max(1, scenario.num_gpus or 1)
    room = place.per_device_train_batch_size // (crowd * times)
    per_device = max(1, min(room, place.batch_size // workers))
    checkpointing = (
        place.gradient_checkpointing
        or (place is not CPU_CLASS and (crowd > 1 or times > 1))
        or (rule_for(scenario).gradient_checkpointing and method in rule_for(scenario).methods)
    )
    found: dict[str, Any] = {
        "train.per_device_train_batch_size": per_device,
        # Of all workers together, which share them evenly.
        "train.gradient_accumulation_steps": workers
        * max(1, place.batch_size // (per_device * workers)),
        "train.gradient_checkpointing": checkpointing and METHODS[method].gradient_checkpointing,
    }
    return found | ({"scaling.num_workers": workers} if workers > 1 else {})


def _filled(method: str, scenario: Scenario, place: MemoryClass) -> float:
    """The share of a GPU's memory that stays taken; 0 where it isn't known or there's none."""
    if not place.gib or scenario.model_size_b is None:
        return 0.0
    bytes_each = _BYTES_4BIT if _quantised(method, scenario, place) else _BYTES
    if METHODS[method].trains == "weights":
        bytes_each = _BYTES_FULL
    return scenario.model_size_b * 1e9 * bytes_each / (place.gib * 2**30)
