"""Attach a method to a base model, and detach it again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rayfin.compat.peft import adapted_layers, forget_adapters, saved_modules
from rayfin.errors import MethodError
from rayfin.methods.base import MethodConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ADAPTER = "default"


def attach(
    base: PreTrainedModel,
    settings: MethodConfig,
    max_steps: int,
    tokenizer_path: str,
    *,
    task_type: str = "CAUSAL_LM",
    keep_dtype: bool = False,
) -> torch.nn.Module:
    """Make `base` trainable in place, and return a PeftModel, or the base itself for method full.

    `task_type` is PEFT's, which the trial's objective names. Trained parameters are float32
    whatever the base is: AdamW's updates vanish in bfloat16. `keep_dtype` leaves the base's own as
    they are, for optimizers that keep float32 copies.
    Raises MethodError where target modules don't exist in this model.
    """
    import peft
    import torch

    settings.check_base(base)
    config = settings.peft_config(max_steps, tokenizer_path)
    if config is None:
        (base if keep_dtype else base.float()).requires_grad_(True)
        return base
    config.task_type = peft.TaskType(task_type)
    try:
        with tied_weights_apart(getattr(settings, "modules_to_save", None)):
            model: torch.nn.Module = peft.get_peft_model(base, config, adapter_name=ADAPTER)
    except ValueError as error:
        if (
            "target_modules" not in str(error).lower()
            and "target modules" not in str(error).lower()
        ):
            raise
        names = ", ".join(linear_names(base))
        raise MethodError(
            f"method.target_modules={getattr(settings, 'target_modules', None)} does not fit this "
            f"model; its linear modules are: {names}"
        ) from error
    except TypeError as error:
        raise MethodError(
            f"method.type={settings.type} can't adapt layers of this model ({error}); use lora, or "
            "name other modules by method.target_modules"
        ) from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    settings.attached(model)
    for _, layer in adapted_layers(model):
        # The hook goes with the layer when the adapter is taken off.
        layer.register_forward_pre_hook(_keep_scales)
    for _, wrapper in saved_modules(model):
        _compute_in_float32(wrapper)
    return model


@contextmanager
def tied_weights_apart(modules_to_save: object) -> Iterator[None]:
    """Leave out PEFT's warning of tied embeddings where a method has `modules_to_save`.

    A head that is tied to the embeddings is then trained, saved, served and merged apart from them.
    """
    with warnings.catch_warnings():
        if modules_to_save:
            warnings.filterwarnings("ignore", ".*tie_word_embeddings=True")
        yield


@contextmanager
def frozen_kept(model: torch.nn.Module) -> Iterator[None]:
    """Have what is frozen of a model frozen afterwards, too.

    PEFT lets all of an adapter train when it puts it on again (`disable_adapter`), what a method
    has frozen of it included.
    """
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def detach(model: torch.nn.Module) -> None:
    """Take the adapter off again.

    The base is as it was before `attach`, bit for bit, but for a method that `alters_base`: what
    was taken out of its weights is not put back.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return
    base: Any = model.get_base_model()
    # PEFT's own `unload` does the same, but refuses IA3 over a quantised base.
    for name, layer in adapted_layers(base):
        _keep_scales(layer)
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, layer.get_base_layer())
    for name, wrapper in saved_modules(base):
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, wrapper.original_module)
    base.requires_grad_(False).eval()
    # Recomputation is a switch on the base, with a hook on its embedding.
    base.activation_checkpointing_disable()
    base.disable_input_require_grads()
    forget_adapters(base)


def _compute_in_float32(wrapper: Any) -> None:
    """Let a trained copy of a module, whose weights are float32, stand in a base of any type."""
    own, dtype = wrapper.modules_to_save[ADAPTER], wrapper.original_module.weight.dtype

    def widen(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # DeepSpeed casts the copy to 16 bits later, and keeps float32 ones aside.
        current: Any = module.weight.dtype
        return tuple(arg.to(current) if arg.is_floating_point() else arg for arg in args)

    if dtype.itemsize < own.weight.dtype.itemsize:
        own.register_forward_pre_hook(widen)
        own.register_forward_hook(lambda _, __, output: output.to(dtype))


def _keep_scales(layer: Any, *_: Any) -> None:
    """Give the 8-bit weight under `layer` its scales back, if it lost them.

    DoRA on CPU replaces the weight at every call by a copy without them (peft 0.21,
    dequantize_module_weight), and bitsandbytes takes them from there on the next call.
    """
    base = layer.get_base_layer()
    if getattr(base.weight, "CB", None) is not None and base.weight.SCB is None:
        base.weight.SCB = base.state.SCB


def linear_names(base: torch.nn.Module) -> list[str]:
    """Return the last parts of the names of the linear modules that an adapter may target."""
    return sorted({name.rpartition(".")[2] for name in linear_modules(base)})


def linear_modules(
    base: torch.nn.Module, named: str | Sequence[str] = ()
) -> dict[str, torch.nn.Module]:
    """Return the modules that an adapter may target, by their names.

    They are the linear ones, transformers' Conv1D among them, but the output head, and those that
    `named` names itself (all-linear names none).
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    head = getattr(base, "lm_head", None)
    ends = () if isinstance(named, str) else tuple(named or ())
    return {
        name: module
        for name, module in base.named_modules()
        if (isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head)
        or (any(f".{name}".endswith(f".{end}") for end in ends) and hasattr(module, "weight"))
    }
