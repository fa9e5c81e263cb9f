"""The strategies by which several workers share one trial, and what each of them can't do."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rayfin.config import Config, MethodConfig, ScalingConfig, TrainConfig
from rayfin.config.optimizers import DEFAULT_OPTIMIZER
from rayfin.config.schema import Strategy
from rayfin.errors import ConfigError, listed
from rayfin.hardware import Hardware
from rayfin.models import ModelFacts
from rayfin.objectives import objective_of
from rayfin.training.sharding import UnshardedBytes, held
from rayfin.training.strategy_files import deepspeed_settings, read_own

STRATEGIES: dict[Strategy, str] = {
    "ddp": "every worker holds all; gradients are averaged",
    "deepspeed-zero1": "DeepSpeed shards the optimizer's state",
    "deepspeed-zero2": "DeepSpeed shards the optimizer's state and the gradients",
    "deepspeed-zero3": "DeepSpeed shards the weights, too",
    "fsdp": "PyTorch's FSDP2 shards the frozen base, or for method.type=full all that is trained",
}
"""Strategy -> what it does.

ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054; FSDP: Zhao et al. 2023, arXiv:2304.11277.
"""

SHARDED_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch")
"""Optimizers whose state was seen to be sharded, gathered and resumed: `ZeroStrategy` knows the
names of AdamW's moments, and the other ones treat a matrix as a whole, or in blocks."""

# Of a worker's memory; the rest is for activations and whatever else is there.
_ROOM = 0.6


@dataclass(frozen=True)
class WorkerLayout:
    """The processes that train one trial together."""

    size: int = 1
    strategy: Strategy = "ddp"
    cpu_offload: bool = False
    own: Mapping[str, Any] | None = None
    """The user's own settings of DeepSpeed or FSDP."""
    why: str = "asked for"
    """Why it has this strategy."""

    @classmethod
    def of(cls, scaling: ScalingConfig) -> WorkerLayout:
        own = read_own(scaling.strategy_config) if scaling.strategy_config else None
        return cls(scaling.num_workers, scaling.strategy, scaling.cpu_offload, own)


@dataclass(frozen=True)
class Share:
    """The part of an optimizer step that one worker takes."""

    batch_size: int
    accumulation: int


def needs_group(scaling: ScalingConfig) -> bool:
    """Return whether a trial needs processes of its own.

    One process alone shards nothing, but may offload.
    """
    return scaling.num_workers > 1 or scaling.strategy not in ("auto", "ddp")


def share_of_step(train: TrainConfig, workers: int) -> Share:
    """Return what each worker takes of a step, whose samples are the same for any number of them.

    Each takes as many at once as divide its part evenly, at most per_device_train_batch_size.
    Raise ConfigError where the samples can't be shared evenly.
    """
    samples = train.per_device_train_batch_size * train.gradient_accumulation_steps
    if samples % workers:
        fitting = [str(n) for n in range(1, samples + 1) if samples % n == 0]
        raise ConfigError(
            f"scaling.num_workers={workers} can't share the {samples} samples of an optimizer step "
            f"(train.per_device_train_batch_size={train.per_device_train_batch_size} x "
            f"train.gradient_accumulation_steps={train.gradient_accumulation_steps}) evenly; use "
            f"{', '.join(fitting)} workers, or train.gradient_accumulation_steps={workers}"
        )
    own = samples // workers
    most = min(own, train.per_device_train_batch_size)
    small = [n for n in range(1, math.isqrt(own) + 1) if own % n == 0]
    batch = max(n for n in (*small, *(own // n for n in small)) if n <= most)
    return Share(batch, own // batch)


def refusal(strategy: Strategy, method: MethodConfig, optim: str = DEFAULT_OPTIMIZER) -> str | None:
    """Return why `strategy` can't train `method`, and what can; None where it can."""
    bits = method.quantization_bit
    shards_state = strategy.startswith("deepspeed") or (
        strategy == "fsdp" and method.trains == "weights"
    )
    if shards_state and optim not in SHARDED_OPTIMIZERS:
        others = "ddp" if method.trains == "weights" else "ddp or fsdp"
        return (
            f"it shards the optimizer's state, and can do so for {listed(SHARDED_OPTIMIZERS)}, not "
            f"train.optim={optim}; use one of these, or {others}, where every worker has it whole"
        )
    if (own := method.strategy_refusal(strategy)) is not None:
        return own
    if strategy == "deepspeed-zero3" and bits:
        return (
            "quantised weights are loaded whole on every worker, so that ZeRO-3 would save nothing "
            "then; use fsdp, which shards them as they lie in host memory, or ddp"
        )
    if strategy == "fsdp" and bits == 8:
        return (
            "8-bit weights keep their scales in attributes that FSDP does not shard; use "
            "method.quantization_bit=4, or ddp"
        )
    return None


def check_scaling(config: Config) -> None:
    """Raise ConfigError for a strategy that can't train `config`, before anything is launched."""
    scaling = config.scaling
    share_of_step(config.train, scaling.num_workers)
    strategy = scaling.strategy
    optim = config.train.optim
    if strategy != "auto" and (why := refusal(strategy, config.method, optim)) is not None:
        quantized = config.method.quantization_bit
        bits = f" with {quantized}-bit weights" if quantized else ""
        raise ConfigError(
            f"scaling.strategy={strategy} can't train method.type={config.method.type}{bits}: {why}"
        )
    if config.train.sample_generations and strategy in ("fsdp", "deepspeed-zero3"):
        raise ConfigError(
            f"train.sample_generations={config.train.sample_generations} can't work with "
            f"scaling.strategy={strategy}: it shards the model, and no worker can run it alone; "
            "use train.sample_generations=0, or scaling.strategy=ddp"
        )
    if strategy == "deepspeed-zero3" and objective_of(config.train).companions():
        raise ConfigError(
            f"scaling.strategy={strategy} can't train train.stage={config.train.stage}: every "
            "worker needs the frozen models beside the trained one whole, and ZeRO-3 would shard "
            "them; use ddp, fsdp, deepspeed-zero1 or deepspeed-zero2"
        )
    if strategy.startswith("deepspeed") and not _installed("deepspeed"):
        raise ConfigError(
            f"scaling.strategy={strategy} needs DeepSpeed, which isn't installed; run: "
            "pip install 'rayfin[deepspeed]', or use scaling.strategy=fsdp or ddp"
        )
    if scaling.cpu_offload:
        if strategy in ("auto", "ddp"):
            raise ConfigError(
                f"scaling.cpu_offload=true with scaling.strategy={strategy}: it moves what a "
                "strategy shards; name one of fsdp, deepspeed-zero1, -zero2, -zero3"
            )
        if scaling.use_gpu is False:
            raise ConfigError(
                "scaling.cpu_offload=true with scaling.use_gpu=false: on CPU all is in host memory "
                "as it is; leave it out"
            )
    if scaling.strategy_config is not None:
        if strategy in ("auto", "ddp"):
            raise ConfigError(
                f"scaling.strategy_config with scaling.strategy={strategy}: the file is "
                "DeepSpeed's or FSDP's; name its strategy"
            )
        own = read_own(scaling.strategy_config, strategy)
        if strategy.startswith("deepspeed"):
            _check_agreement(config, own)


def _check_agreement(config: Config, own: Mapping[str, Any]) -> None:
    """Raise ConfigError where `own` says something else than rayfin would on any device."""
    share = share_of_step(config.train, config.scaling.num_workers)
    problems: list[ConfigError] = []
    for precision in ("float32", "bfloat16", "float16"):
        try:
            deepspeed_settings(
                config.scaling.strategy,
                own,
                batch_size=share.batch_size,
                accumulation=share.accumulation,
                workers=config.scaling.num_workers,
                max_grad_norm=config.train.max_grad_norm,
                precision=precision,
                offload=config.scaling.cpu_offload,
            )
        except ConfigError as problem:
            problems.append(problem)
        else:
            return
    raise problems[0]


@cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@cache
def verified() -> dict[str, dict[str, list[str]]]:
    """Return, by device and strategy, the methods that were seen to train as one process does.

    Written by experiments/strategy_table.py, never by hand.
    """
    whole = json.loads((Path(__file__).with_name("verified.json")).read_text())
    found: dict[str, dict[str, list[str]]] = whole["verified"]
    return found


def choose(
    method: MethodConfig,
    facts: ModelFacts,
    hardware: Hardware,
    *,
    workers: int,
    here: int,
    train: TrainConfig | None = None,
    dtype: str = "auto",
    beside: float = 0.0,
) -> tuple[Strategy, str]:
    """Return the simplest strategy that fits the memory of a worker, and why (for `auto`).

    `here`: how many of the `workers` share the memory of a machine that has no GPU; `dtype`: that
    of the base, model.dtype; `train` has the optimizer; `beside`: bytes of the objective's
    companions. Activations are not counted, but have room left for them. Only what `verified` holds
    for the device is chosen; for GPUs, while nothing was run on any, what it holds for CPUs, and
    `why` says so.
    """
    on_gpu = hardware.device == "cuda"
    memory = hardware.device_memory if on_gpu else hardware.host_memory / here
    name = method.type if method.quantization_bit != 8 else f"{method.type}, 8-bit"
    device = "cuda" if on_gpu and "cuda" in verified() else "cpu"
    doubt = "; verified on CPUs only" if on_gpu and device == "cpu" else ""
    seen = {s for s, methods in verified()[device].items() if name in methods}
    order: list[Strategy] = ["ddp"]
    if method.changes_base and _installed("deepspeed"):
        order.append("deepspeed-zero2")  # of what is trained, most is gradients and moments
    order.append("fsdp")
    train = train or TrainConfig()
    usable = [s for s in order if s in seen and refusal(s, method, train.optim) is None]
    needs = {}
    for strategy in usable:
        whole = UnshardedBytes.of(method, facts, strategy, dtype, hardware.device, train)
        needs[strategy] = beside + sum(held(strategy, whole, workers=workers))
    room = memory * _ROOM
    size = f"about {{:.1f}} GB of each worker's {memory / 1e9:.1f} GB"
    for strategy in usable:
        if needs[strategy] <= room:
            past = usable[: usable.index(strategy)]
            told = f", where {past[-1]} needs {needs[past[-1]] / 1e9:.1f} GB" if past else ""
            taken = size.format(needs[strategy] / 1e9)
            return strategy, f"weights and what is trained take {taken}{told}{doubt}"
    if not usable:
        return "ddp", f"nothing else was seen to train {name}"
    least = min(usable, key=lambda strategy: needs[strategy])
    taken = size.format(needs[least] / 1e9)
    return least, f"it needs the least, {taken}; that may be too much{doubt}"
