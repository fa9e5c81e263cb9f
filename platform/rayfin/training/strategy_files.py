"""DeepSpeed's and FSDP's settings: generated from rayfin's own, and the user's laid over them.

What rayfin sets itself (batch, accumulation, clipping, precision, stage, offloading) is set in one
place only: in the user's file it may be left out, be "auto", or be the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayfin.compat.deepspeed import zero_settings
from rayfin.config.schema import Strategy
from rayfin.errors import ConfigError, did_you_mean

Settings = dict[str, Any]

LARGEST_BUCKET = 500_000_000
"""The most gradients that DeepSpeed sends at a time: its default of reduce_bucket_size."""

_OWNER = {
    "train_batch_size": "train.per_device_train_batch_size and train.gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "train.per_device_train_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "train.max_grad_norm",
    "bf16.enabled": "the device: bfloat16 where it has it",
    "fp16.enabled": "the device: float16 on GPUs without bfloat16",
    "zero_optimization.stage": "scaling.strategy",
    "zero_optimization.offload_optimizer": "scaling.cpu_offload",
    "zero_optimization.offload_param": "scaling.cpu_offload",
    "version": "rayfin, which uses FSDP2",
    "cpu_offload": "scaling.cpu_offload",
    "activation_checkpointing": "train.gradient_checkpointing",
}
"""Settings of DeepSpeed and FSDP, and where rayfin has each of them."""

_REFUSED = {
    "optimizer": "rayfin has train.optim, train.learning_rate and train.weight_decay",
    "scheduler": "rayfin has train.lr_scheduler_type, train.warmup_ratio and train.warmup_steps",
    "state_dict_type": "rayfin's checkpoints are the same for every strategy",
    "cpu_ram_efficient_loading": "rayfin shards a model layer by layer as it lies in host memory",
}

_DEEPSPEED_KEYS = frozenset(
    {
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        *("gradient_clipping", "bf16", "fp16", "zero_optimization", "communication_data_type"),
        *("prescale_gradients", "gradient_predivide_factor", "sparse_gradients", "aio"),
        *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "wall_clock_breakdown"),
        *("memory_breakdown", "steps_per_print", "dump_state", "comms_logger", "flops_profiler"),
        *("tensorboard", "wandb", "csv_monitor"),
    }
)
_FSDP_KEYS = frozenset(
    {
        *("version", "reshard_after_forward", "transformer_layer_cls_to_wrap"),
        *("cpu_offload", "activation_checkpointing"),
    }
)


def read_own(path: str, strategy: Strategy | None = None) -> Settings:
    """Reads the user's file; raises ConfigError where it can't be read or used with `strategy`."""
    try:
        own = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"scaling.strategy_config: '{path}' can't be read ({reason}); give a JSON file"
        ) from error
    if not isinstance(own, dict):
        raise ConfigError(f"scaling.strategy_config: '{path}' holds no JSON object of settings")
    own = {str(key).removeprefix("fsdp_"): value for key, value in own.items()}
    if strategy is not None:
        _check_names(own, strategy)
    return own


def _check_names(own: Settings, strategy: Strategy) -> None:
    known = _FSDP_KEYS if strategy == "fsdp" else _DEEPSPEED_KEYS
    for key in own:
        if key in _REFUSED:
            raise ConfigError(
                f"scaling.strategy_config: '{key}' is not for the file; {_REFUSED[key]}"
            )
        if key not in known:
            raise ConfigError(
                f"scaling.strategy_config: '{key}' is no setting of {strategy}"
                f"{did_you_mean(key, known)}; it may have {', '.join(sorted(known))}"
            )
    if strategy == "fsdp":
        _check_fsdp(own)
        return
    zero = own.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError("scaling.strategy_config: zero_optimization is no object of settings")
    # An unknown one would be dropped by DeepSpeed without a word.
    names = zero_settings()
    for key in zero:
        if key not in names:
            raise ConfigError(
                f"scaling.strategy_config: 'zero_optimization.{key}' is no setting of DeepSpeed"
                f"{did_you_mean(key, names)}"
            )


def _check_fsdp(own: Settings) -> None:
    reshard = own.get("reshard_after_forward", True)
    if not isinstance(reshard, bool):
        raise ConfigError(
            f"scaling.strategy_config: reshard_after_forward={reshard!r} must be true or false"
        )
    layers = own.get("transformer_layer_cls_to_wrap", [])
    names = [layers] if isinstance(layers, str) else layers
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            f"scaling.strategy_config: transformer_layer_cls_to_wrap={layers!r} must be a class's "
            "name, or a list of them"
        )


def deepspeed_settings(
    strategy: Strategy,
    own: Mapping[str, Any] | None,
    *,
    batch_size: int,
    accumulation: int,
    workers: int,
    max_grad_norm: float,
    precision: str,
    offload: bool,
) -> Settings:
    """Returns what DeepSpeed is started with; `precision` is float32, bfloat16 or float16.

    Raises ConfigError where `own` sets what rayfin sets, and otherwise.
    """
    stage = int(strategy[-1])
    zero: Settings = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    generated: Settings = {
        "train_batch_size": batch_size * accumulation * workers,
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": precision == "bfloat16"},
        "fp16": {"enabled": precision == "float16"},
        "zero_optimization": zero,
        # The optimizer is PyTorch's AdamW, as everywhere.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,  # rayfin reports
    }
    return lay_over(generated, own or {})


def lay_over(generated: Settings, own: Mapping[str, Any], where: str = "") -> Settings:
    """Returns `generated` with what `own` adds; raises ConfigError where the two disagree."""
    merged = dict(generated)
    for key, value in own.items():
        name = f"{where}{key}"
        mine = generated.get(key)
        if name in _OWNER:
            if value not in ("auto", mine) and not _same_offload(name, value, mine):
                raise ConfigError(
                    f"scaling.strategy_config: {name}={json.dumps(value)} is set by "
                    f'{_OWNER[name]} (here {json.dumps(mine)}); leave it out, or give "auto"'
                )
        elif isinstance(value, Mapping) and isinstance(mine, dict | None):
            merged[key] = lay_over(mine or {}, value, f"{name}.")
        elif value != "auto":
            merged[key] = value
    return merged


def _same_offload(name: str, value: Any, mine: Any) -> bool:
    """Whether a file offloads just as cpu_offload does, however it says so."""
    if not name.rpartition(".")[2].startswith("offload_") or not isinstance(value, Mapping):
        return False
    return (value.get("device", "none") == "none") == (mine is None) and (
        mine is None or value.get("device") == "cpu"
    )
