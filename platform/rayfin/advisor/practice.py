"""The settings to start from without any trials, which practice agrees on, each with its source.

The settings of a method are in its module in rayfin.methods, and learning rates with their sources
in rayfin.methods.rates; this module adapts them to the hardware, the model and the data.
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


@dataclass(frozen=True)
class MemoryClass:
    """The settings for devices with so much memory."""

    gib: float
    """The nominal memory of one GPU, or 0 for a CPU."""
    r: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    max_length: int
    """The tokens of a sample, where the scenario doesn't say."""
    gradient_checkpointing: bool
    quantise_above_b: float
    """Billions of parameters above which the base model is loaded in 4 bits."""

    @property
    def batch_size(self) -> int:
        """The number of samples of an optimizer step."""
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
"""A CPU, which lacks time rather than memory: rayfin's own defaults, a convention."""

_SOLD = 0.9
"""The share of its nominal memory that a GPU reports at least: some of 24 GB report 22 GiB."""


def memory_class(gpu_memory_gb: float | None) -> MemoryClass:
    """Return the largest class that a GPU of so many GiB has memory for, else the smallest.

    None stands for a CPU.
    """
    if gpu_memory_gb is None:
        return CPU_CLASS
    fitting = (it for it in MEMORY_CLASSES if gpu_memory_gb >= _SOLD * it.gib)
    return next(fitting, MEMORY_CLASSES[-1])


def rank(gpu_memory_gb: float | None) -> int:
    """Return the rank of a low-rank method by the GiB of a GPU; None stands for a CPU."""
    return memory_class(gpu_memory_gb).r


_BYTES, _BYTES_4BIT = 2.0, 0.5
_BYTES_FULL = _BYTES + 2 + 8
"""The bytes of a trained parameter, with its gradient and Adam's two moments."""


def settings(scenario: Scenario, method: str) -> dict[str, Any]:
    """Return the dotted settings for a method in a scenario, to be merged into a configuration.

    The model, the data's path and the number of steps are not among them. Raises ConfigError for an
    unknown method.
    """
    own, device = _checked(method), _device_class(scenario)
    length = max(8, scenario.sequence_length or device.max_length)
    usual = own.usual(device.r, length)
    return {
        "method.type": method,
        **{f"method.{name}": value for name, value in usual.items()},
        **({"method.quantization_bit": 4} if _quantised(method, scenario, device) else {}),
        "train.learning_rate": learning_rate(method, scenario.model_size_b),
        **_batch(method, scenario, device, length),
        "data.max_length": length,
    }


def _checked(method: str) -> type[MethodConfig]:
    if method not in METHODS:
        raise ConfigError(
            f"method.type: '{method}' must be one of {', '.join(METHODS)}"
            f"{did_you_mean(method, METHODS)}"
        )
    return METHODS[method]


def _device_class(scenario: Scenario) -> MemoryClass:
    if scenario.hardware == "cpu":
        return CPU_CLASS
    if scenario.gpu_memory_gb is None and scenario.hardware in ("single_gpu", "multi_gpu"):
        return MEMORY_CLASSES[-1]
    return memory_class(scenario.gpu_memory_gb)


def _quantised(method: str, scenario: Scenario, device: MemoryClass) -> bool:
    large = (scenario.model_size_b or 0) > device.quantise_above_b
    own = METHODS[method]
    return own.quantized_by_default() or (large and own.quantized_base)


def _batch(method: str, scenario: Scenario, device: MemoryClass, length: int) -> dict[str, Any]:
    """Return the batch of the device's class, divided where the model or long samples need room.

    It is halved where the weights take more than a quarter of the memory, and again for more than
    half: a convention, nothing measured. Several GPUs share the batch of one.
    """
    filled = _filled(method, scenario, device)
    crowd = 1 if filled <= 1 / 4 else 2 if filled <= 1 / 2 else 4
    times = math.ceil(length / device.max_length)
    workers = 1
    if scenario.hardware == "multi_gpu":
        workers = max(1, scenario.num_gpus or 1)
    room = device.per_device_train_batch_size // (crowd * times)
    per_device = max(1, min(room, device.batch_size // workers))
    checkpointing = (
        device.gradient_checkpointing
        or (device is not CPU_CLASS and (crowd > 1 or times > 1))
        or (rule_for(scenario).gradient_checkpointing and method in rule_for(scenario).methods)
    )
    found: dict[str, Any] = {
        "train.per_device_train_batch_size": per_device,
        # Of all workers together, which share them evenly.
        "train.gradient_accumulation_steps": workers
        * max(1, device.batch_size // (per_device * workers)),
        "train.gradient_checkpointing": checkpointing and METHODS[method].gradient_checkpointing,
    }
    return found | ({"scaling.num_workers": workers} if workers > 1 else {})


def _filled(method: str, scenario: Scenario, device: MemoryClass) -> float:
    """Return the share of a GPU's memory that the weights take; 0 if unknown or without a GPU."""
    if not device.gib or scenario.model_size_b is None:
        return 0.0
    bytes_each = _BYTES_4BIT if _quantised(method, scenario, device) else _BYTES
    if METHODS[method].trains == "weights":
        bytes_each = _BYTES_FULL
    return scenario.model_size_b * 1e9 * bytes_each / (device.gib * 2**30)
