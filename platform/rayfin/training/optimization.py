"""Settings of the optimizer, the schedule and kernels that can't work, refused before a start."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache

from rayfin.config import Config, ModelConfig, TrainConfig
from rayfin.config.optimizers import ADAM_SETTINGS, OPTIMIZERS, parse_arguments
from rayfin.errors import ConfigError, HardwareError
from rayfin.objectives import objective_of
from rayfin.training.precision import MIXED
from rayfin.training.schedules import EVALUATED, check_schedule

_ATTENTION_PACKAGES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
}
_OWNERS = {
    "adam_beta1": "AdamW, AdEMAMix and Lion",
    "adam_beta2": "AdamW, AdEMAMix and Lion",
    "adam_epsilon": "AdamW and AdEMAMix",
}
_INSTALLED_AS = {
    "flash_attn": "flash-attn",
    "flash_attn_interface": "flash-attn-3",
    "liger_kernel": "liger-kernel",
}


def check_optimization(config: Config) -> None:
    """Raise ConfigError for settings without an effect, for wrong ones, and for what is missing."""
    train, objective = config.train, objective_of(config.train)
    _check_optimizer(train)
    if train.warmup_steps is not None and train.warmup_ratio != TrainConfig().warmup_ratio:
        raise ConfigError(
            f"train.warmup_steps={train.warmup_steps} and train.warmup_ratio={train.warmup_ratio:g}"
            " say the same; give one of them"
        )
    check_schedule(train, train.steps)
    if train.lr_scheduler_type in EVALUATED and "eval_loss" not in objective.metrics:
        raise ConfigError(
            f"train.lr_scheduler_type={train.lr_scheduler_type} follows the eval loss, which "
            f"train.stage={train.stage} does not measure; use cosine or linear"
        )
    if train.label_smoothing_factor and not objective.label_smoothing:
        raise ConfigError(
            f"train.label_smoothing_factor={train.label_smoothing_factor:g} can't work with "
            f"train.stage={train.stage}: its loss is no cross entropy of tokens; leave it out"
        )
    if config.model.attn_implementation.startswith("flash") and config.model.dtype == "float32":
        raise ConfigError(
            f"model.attn_implementation={config.model.attn_implementation} can't work with "
            "model.dtype=float32: flash attention computes in 16 bits; use sdpa, or another dtype"
        )
    for setting, package in _packages(config.model, train):
        if not _installed(package):
            name = _INSTALLED_AS.get(package, package)
            raise ConfigError(
                f"{setting} needs {name}, which isn't installed; run: pip install {name}, or leave "
                "it out"
            )
    if config.scaling.use_gpu != "auto":
        check_device(config.model, train, "cuda" if config.scaling.use_gpu else "cpu")


def needs_device(model: ModelConfig, train: TrainConfig) -> bool:
    """Return whether a setting can't work without a GPU, or not on one."""
    return model.dtype == MIXED or any(True for _ in _gpu_settings(model, train))


def check_device(model: ModelConfig, train: TrainConfig, device: str) -> None:
    """Raise HardwareError for a setting that needs a GPU where there is none, or a processor."""
    if device == "cuda":
        if model.dtype == MIXED:
            raise HardwareError(
                f"model.dtype={MIXED} is for processors, and this would run on a GPU, where "
                "products are 16-bit anyway; use model.dtype=auto, or scaling.use_gpu=false"
            )
        return
    for setting, remedy in _gpu_settings(model, train):
        raise HardwareError(f"{setting} needs a GPU, and this would run on CPU; use {remedy}")


def _check_optimizer(train: TrainConfig) -> None:
    facts, name = OPTIMIZERS[train.optim], train.optim
    for setting in ADAM_SETTINGS:
        value = getattr(train, setting)
        if setting not in facts.settings and value != TrainConfig.model_fields[setting].default:
            raise ConfigError(
                f"train.{setting}={value:g} has no effect with train.optim={name}: it is of "
                f"{_OWNERS[setting]}; leave it out"
            )
    try:
        arguments = parse_arguments(train.optim_args, facts.arguments)
    except ValueError as error:
        raise ConfigError(
            f"train.optim_args={train.optim_args!r} with train.optim={name}: {error}"
        ) from None
    if arguments.get("nesterov") and (not arguments.get("momentum") or arguments.get("dampening")):
        raise ConfigError(
            f"train.optim_args={train.optim_args!r} with train.optim={name}: nesterov needs a "
            "momentum above 0, and no dampening"
        )
    if arguments.get("dampening") and not arguments.get("momentum"):
        raise ConfigError(
            f"train.optim_args={train.optim_args!r} with train.optim={name}: dampening has no "
            "effect without a momentum above 0"
        )


def _packages(model: ModelConfig, train: TrainConfig) -> Iterator[tuple[str, str]]:
    """Yield each setting that needs a package, and the package's module."""
    if package := OPTIMIZERS[train.optim].package:
        yield f"train.optim={train.optim}", package
    if package := _ATTENTION_PACKAGES.get(model.attn_implementation):
        yield f"model.attn_implementation={model.attn_implementation}", package
    if train.use_liger_kernel:
        yield "train.use_liger_kernel=true", "liger_kernel"


def _gpu_settings(model: ModelConfig, train: TrainConfig) -> Iterator[tuple[str, str]]:
    """Yield each setting that needs a GPU, and what to use without one."""
    if OPTIMIZERS[train.optim].paged:
        yield (
            f"train.optim={train.optim}",
            train.optim.removeprefix("paged_")
            .replace("adamw_32bit", "adamw_torch")
            .replace("ademamix_32bit", "ademamix"),
        )
    if model.attn_implementation.startswith("fl"):
        yield f"model.attn_implementation={model.attn_implementation}", "sdpa or eager"
    if train.use_liger_kernel:
        yield "train.use_liger_kernel=true", "train.use_liger_kernel=false"


@cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
