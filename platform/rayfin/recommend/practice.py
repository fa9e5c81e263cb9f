"""Settings that practice agrees on, each with its source: where to start without any trials.

Sources that come up again:

- LoRA Without Regret: Schulman and Thinking Machines Lab 2025, doi 10.64434/tml.20250929, and what
  TRL's documentation takes from it (huggingface.co/docs/trl/lora_without_regret);
- QLoRA: Dettmers et al. 2023, arXiv:2305.14314, and its code (github.com/artidoro/qlora);
- PEFT's guides: huggingface.co/docs/peft, the quicktour, "Prompt-based methods" and "IA3";
- PEFT's comparison: github.com/huggingface/peft, method_comparison/MetaMathQA, where many methods
  train Llama-3.2-3B on one task.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rayfin.config.method import METHOD_CONFIGS
from rayfin.errors import ConfigError, did_you_mean
from rayfin.methods.table import METHODS
from rayfin.recommend.rules import rule_for
from rayfin.recommend.scenario import Scenario

TARGET_MODULES = "all-linear"
"""What low-rank methods adapt: every linear layer but the output head.

QLoRA needed all of them to match full fine-tuning, and LoRA Without Regret finds that attention
alone does worse even at a rank that makes up for the parameters.
"""

_LORA_RATES = ((2.0, 5e-4), (20.0, 2e-4), (math.inf, 1e-4))
"""Billions of parameters below which a rate holds.

The last two are QLoRA's: 2e-4 for 7B and 13B, 1e-4 beyond (its README; 20 lies between 13B and the
33B that it tried next). TRL's guide has 2e-4 for a 3B. For small models the one source at hand is
PEFT's quicktour, 1e-3 for Llama-3.2-1B; 5e-4 lies between, a convention and nothing measured.
"""
_LORA_SHARE = {
    "lora": 1.0,
    "qlora": 1.0,
    # LoRA's share is 1; full tuning's is a tenth of it by LoRA Without Regret. That makes Alpaca's
    # 2e-5 for LLaMA-7B (github.com/tatsu-lab/stanford_alpaca), TRL's default too.
    "full": 0.1,
    # "Slightly lower than that of LoRA" (github.com/NVlabs/DoRA); by how much is a convention.
    "dora": 0.75,
    # lora_alpha below gives it LoRA's scale at rank 16. PEFT's comparison has one rate for both.
    "rslora": 1.0,
    # PEFT's comparison gives it LoRA's rate.
    "adalora": 1.0,
}
_RATES = {
    # The best of 1e-4, 1e-3 and 5e-3 in PEFT's comparison; PEFT's guide has 8e-3 (mt0-large).
    "ia3": 5e-3,
    # PEFT's comparison has 1e-4, its guide 3e-2 (bloomz-560m): the mean of their logarithms.
    "p_tuning": 2e-3,
    # Better than 1e-3 in PEFT's comparison; its guide has 3e-2.
    "prefix_tuning": 5e-3,
    # PEFT's comparison has 1e-3, far better than 1e-4; its guide 3e-2: the mean as above.
    "prompt_tuning": 5e-3,
}
_SPREADS = {"p_tuning": 20.0, "prefix_tuning": 6.0, "prompt_tuning": 6.0}
_SPREAD = 5.0


def learning_rate(method: str, model_size_b: float | None = None) -> float:
    """The peak rate to start from, for AdamW, whatever the rank; ConfigError for another method.

    `model_size_b` is in billions of parameters; None takes the rate of 2 to 20. It is nearly the
    same for all ranks because the update is scaled by alpha / r (LoRA Without Regret). Methods that
    train few numbers take a larger one, which no source gives by size.
    """
    _check(method)
    if method in _RATES:
        return _RATES[method]
    size = 7.0 if model_size_b is None else model_size_b
    rate = next(rate for below, rate in _LORA_RATES if size < below)
    # 2e-4 * 0.1 is not 2e-5 to the last digit, and people read this number.
    return float(f"{rate * _LORA_SHARE[method]:.3g}")


def learning_rate_spread(method: str) -> float:
    """Sources' rates are at most this factor above or below; ConfigError for another method.

    P-Tuning's are 300 apart. The factors take in every rate that is named above.
    """
    _check(method)
    return _SPREADS.get(method, _SPREAD)


def lora_alpha(method: str, r: int) -> float:
    """The alpha of a low-rank method; raises ConfigError for another one and for r below 1.

    32 whatever the rank, the default of LoRA Without Regret's authors (tinker-cookbook); QLoRA too
    keeps one, 16. With alpha / r the best learning rate then hardly moves with the rank. The other
    convention, alpha = 2 r (PEFT's comparison), is the same at rank 16 and takes larger steps above
    it. rslora divides by sqrt(r) (arXiv:2312.03732): 8 gives it the same scale, 2, at rank 16, a
    convention.
    """
    _check(method)
    if METHODS[method].trains != "low rank":
        low_rank = ", ".join(name for name, it in METHODS.items() if it.trains == "low rank")
        raise ConfigError(f"method.type={method} has no lora_alpha; those that have: {low_rank}")
    if r < 1:
        raise ConfigError(f"method.r={r} must be 1 or more")
    return 8.0 if method == "rslora" else 32.0


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
_VIRTUAL_TOKENS = 20
"""As in PEFT's guide to prompt-based methods."""


def settings(scenario: Scenario, method: str) -> dict[str, Any]:
    """Dotted settings for `method` in `scenario`, to be laid over any configuration.

    The model, the data's path and the number of steps are not among them. Raises ConfigError for a
    method that there is not.
    """
    _check(method)
    place = _place(scenario)
    length = max(8, scenario.sequence_length or place.max_length)
    return {
        "method.type": method,
        **_method_settings(method, place, length),
        **_quantisation(method, scenario, place),
        "train.learning_rate": learning_rate(method, scenario.model_size_b),
        **_batch(method, scenario, place, length),
        "data.max_length": length,
    }


def _check(method: str) -> None:
    if method not in METHOD_CONFIGS:
        raise ConfigError(
            f"method.type: '{method}' must be one of {', '.join(METHOD_CONFIGS)}"
            f"{did_you_mean(method, METHOD_CONFIGS)}"
        )


def _place(scenario: Scenario) -> MemoryClass:
    if scenario.hardware == "cpu":
        return CPU_CLASS
    if scenario.gpu_memory_gb is None and scenario.hardware in ("single_gpu", "multi_gpu"):
        return MEMORY_CLASSES[-1]
    return memory_class(scenario.gpu_memory_gb)


def _method_settings(method: str, place: MemoryClass, length: int) -> dict[str, Any]:
    if METHODS[method].virtual_tokens:
        # They are part of the sample's length, which short samples need for themselves.
        return {"method.num_virtual_tokens": min(_VIRTUAL_TOKENS, length // 2)}
    if METHODS[method].trains != "low rank":
        return {}
    alpha = {"method.lora_alpha": lora_alpha(method, place.r)}
    targets = {"method.target_modules": TARGET_MODULES}
    if method == "adalora":
        # Half as much again to begin with: PEFT's defaults, 12 and 8.
        return {"method.init_r": place.r * 3 // 2, "method.target_r": place.r, **alpha, **targets}
    return {"method.r": place.r, **alpha, **targets}


def _quantisation(method: str, scenario: Scenario, place: MemoryClass) -> dict[str, Any]:
    return {"method.quantization_bit": 4} if _quantised(method, scenario, place) else {}


def _quantised(method: str, scenario: Scenario, place: MemoryClass) -> bool:
    large = (scenario.model_size_b or 0) > place.quantise_above_b
    return method == "qlora" or (large and METHODS[method].quantized_base)


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
