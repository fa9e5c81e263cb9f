"""PEFT's names that it does not document: its layers, and what it leaves on a base model."""

from __future__ import annotations

from functools import partial
from typing import Any

from rayfin.compat.private import PrivateName

_name = partial(PrivateName, __name__)

_LAYER = _name(
    "peft.tuners.tuners_utils",
    "BaseTunerLayer",
    needed_to="find the layers that an adapter has replaced",
    instead="a public list of a PeftModel's adapted layers",
)
_SAVED = _name(
    "peft.utils.other",
    "ModulesToSaveWrapper",
    needed_to="find the modules that are trained whole",
    instead="a public list of a PeftModel's modules_to_save",
)
_CONFIGS = _name(
    "peft.tuners.tuners_utils",
    "BaseTuner.peft_config",
    needed_to="take an adapter off its base model without a trace",
    instead="an `unload` that takes IA3 off a quantised base and deletes its mark",
    on_instances=True,
)
_ALLOCATOR = _name(
    "peft.tuners.adalora.model",
    "AdaLoraModel.rankallocator",
    needed_to="write AdaLoRA's importance scores into a checkpoint",
    instead="a state_dict of AdaLoRA's RankAllocator",
    on_instances=True,
)
_INITIALIZE = partial(
    _name,
    "peft.tuners.lora.layer",
    instead="a function that returns the first weights for a layer",
)
_PISSA = _INITIALIZE(
    "LoraLayer.pissa_init",
    needed_to="start from a weight's principal part (PiSSA)",
    parameters=("adapter_name", "init_lora_weights"),
)
_OLORA = _INITIALIZE(
    "LoraLayer.olora_init",
    needed_to="start from a weight's QR decomposition (OLoRA)",
    parameters=("adapter_name",),
)


def adapted_layers(model: Any) -> list[tuple[str, Any]]:
    """Return names and modules of the layers that PEFT put in place of the base's own."""
    kind = _LAYER.get()
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def saved_modules(model: Any) -> list[tuple[str, Any]]:
    """Return names and wrappers of the modules that are trained whole."""
    kind = _SAVED.get()
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def forget_adapters(base: Any) -> None:
    """Delete the mark that PEFT leaves on a base, for which the next adapter would be a second."""
    if hasattr(base, "peft_config"):
        del base.peft_config


def rank_allocator(model: Any, adapter: str) -> Any:
    """Return the RankAllocator of AdaLoRA's `adapter`; None where `model` has none."""
    if adapter not in getattr(model, "peft_config", {}):
        return None
    return getattr(model.base_model, "rankallocator", None)


def initialize_from_weight(layer: Any, adapter: str, kind: str) -> None:
    """Set A and B of a LoRA layer to a part of its weight, which PEFT may take out of it.

    `kind` is `pissa`, `pissa_niter_<iterations>` or `olora`.
    """
    if kind == "olora":
        _OLORA.of(layer)(adapter)
    else:
        _PISSA.of(layer)(adapter, kind)
