"""The precision of a trial's products on this processor, where model.dtype leaves it to rayfin."""

from __future__ import annotations

from rayfin.config import Config
from rayfin.hardware import CLEAR_GAIN, bfloat16_gain, describe_hardware
from rayfin.methods import METHODS, MethodConfig
from rayfin.training.strategies import needs_group

MIXED = "bf16-mixed"


def with_precision(config: Config) -> Config:
    """Return `config` for trials on this machine, with model.dtype=bf16-mixed where that is faster.

    It is where model.dtype is auto, the trials run on the processor, one process each, over a base
    that is neither quantised nor trained itself, and bfloat16 products are clearly faster here
    (`rayfin.hardware.bfloat16_gain`). Else model.dtype stays auto, which is float32.
    """
    if (mixed := in_mixed_precision(config)) is None:
        return config
    if describe_hardware(config.scaling.use_gpu).device != "cpu":
        return config
    if (gain := bfloat16_gain()) is None or gain < CLEAR_GAIN:
        return config
    return mixed


def in_mixed_precision(config: Config) -> Config | None:
    """Return `config` with bf16-mixed, which a machine may choose; None where none does."""
    if config.model.dtype != "auto" or needs_group(config.scaling) or not _suits(config):
        return None
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": MIXED})})


def precision_note(config: Config) -> list[str]:
    """Return a line on the precision that was chosen for `config`; none where it is float32."""
    if config.model.dtype != MIXED or (gain := bfloat16_gain()) is None:
        return []
    return [
        f"model.dtype={MIXED}: bfloat16 products are {gain:.1f} times as fast as float32 on this "
        "processor; model.dtype=float32 computes in float32"
    ]


def mixed_refusal(method: MethodConfig) -> tuple[str, str] | None:
    """Return why a method can't train over bfloat16 products, and the remedy; None where it can."""
    remedy = "use model.dtype=auto or float32"
    if method.quantization_bit:
        return f"the weights are in {method.quantization_bit} bits, and not in bfloat16", remedy
    if method.trains == "weights" or method.alters_base:
        return "it changes the base's own weights, which have to be float32 for that", remedy
    return None


def _suits(config: Config) -> bool:
    """Return whether all trials of a configuration can have bfloat16 products."""
    axes = config.sweep.parameters
    settings = ("model.dtype", "method.quantization_bit", "method.init_lora_weights")
    if any(name in axes for name in settings):
        return False  # each trial would have another precision
    swept = axes.get("method.type", ())
    kinds = [METHODS[name] for name in swept if name in METHODS] if isinstance(swept, tuple) else []
    quantized = any(kind.quantized_by_default() or kind.trains == "weights" for kind in kinds)
    return not quantized and mixed_refusal(config.method) is None
