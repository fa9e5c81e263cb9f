"""bitsandbytes' private names: what loads a compiler, warns, and repacks weights."""

from __future__ import annotations

import copy
import importlib.util
import logging
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from rayfin.compat.private import PrivateName

if TYPE_CHECKING:
    import torch
    from torch.nn import Module

_name = partial(PrivateName, __name__)

_COMPILE = _name(
    "torch",
    "compile",
    needed_to="import bitsandbytes without loading torch's compiler",
    instead="an import of bitsandbytes that compiles its fallback kernels at their first use",
    keywords=("model",),
)
_KERNEL_WARNING = _name(
    "bitsandbytes.backends.cpu.ops",
    "logger",
    needed_to="leave out a warning of kernels that it does not use",
    instead="a setting of bitsandbytes that turns off its repacking of 4-bit weights",
)
_CAST_WARNING = _name(
    "bitsandbytes.autograd._functions",
    "logger",
    needed_to="leave out a warning of 8-bit layers that cast at every call",
    instead="a setting of bitsandbytes that turns it off",
)
_PACKS = _name(
    "bitsandbytes.nn",
    "Linear4bit.support_avx512bf16_for_cpu",
    needed_to="train and evaluate 4-bit layers as they are stored",
    instead="a setting of bitsandbytes that turns off its repacking of 4-bit weights",
    on_instances=True,
)
_UNPACK = _name(
    "bitsandbytes.functional",
    "_convert_weight_packed_for_cpu_inverse",
    needed_to="read 4-bit weights that were repacked for a CPU",
    instead="dequantize_4bit of repacked weights",
    keywords=("packed_weight", "quant_state"),
)

_IMPORTING = threading.Lock()


def import_bitsandbytes() -> None:
    """Import bitsandbytes; call this before PEFT is imported, which imports it where it is.

    bitsandbytes (0.50) wraps four fallback kernels in `torch.compile` as it is imported. That loads
    the compiler (torch._inductor.compile_fx): 1.5 of the 5.6 seconds that a worker's imports take,
    and 44 MB. CPU and CUDA have kernels of their own for all but odd shapes, for which the plain
    function computes the same. Does nothing where bitsandbytes is missing, or imported already.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return
    import torch

    with _IMPORTING:
        if "bitsandbytes" in sys.modules:
            return
        compiler, importer = torch.compile, threading.get_ident()

        def plain(model: Callable[..., Any] | None = None, **options: Any) -> Any:
            if threading.get_ident() != importer:
                return compiler(model, **options)  # somebody else's, beside the import
            return model or (lambda decorated: decorated)

        # On processors with bfloat16 it asks for a package of kernels that `without_packing` leaves
        # unused, and warns everybody who lacks it.
        logging.getLogger(_KERNEL_WARNING.module).setLevel(logging.ERROR)
        torch.compile = plain
        try:
            importlib.import_module("bitsandbytes")
        finally:
            torch.compile = compiler


def without_packing(model: Module) -> None:
    """Have 4-bit layers of `model` keep their weights as they are, on any processor.

    On those with bfloat16 bitsandbytes (0.50) repacks them in place at the first call without
    gradients, for a product that rounds to bfloat16 and has no derivative: a model that was
    evaluated before it is trained would train its last layers only, and other processors would
    compute something else.
    """
    name = _PACKS.name.rpartition(".")[2]
    for module in model.modules():
        if hasattr(module, name):
            setattr(module, name, False)


def unpacked(data: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    """Return 4-bit weights and their state as `dequantize_4bit` takes them, repacked or not.

    On CPUs with AVX512-BF16 the first call of a layer shuffles its weights, and flattens their
    scales. The library's way back changes the state that it is given, and its nested branch rounds.
    """
    if not getattr(state, "packing_format_for_cpu", False):
        return data, state
    state = copy.copy(state)
    scales = state.absmax.T.reshape(-1).float()
    state.original_nested = False
    data, state = _UNPACK.get()(data, state)
    state.absmax = scales
    return data, state


def forget_optimizers() -> None:
    """Drop what bitsandbytes keeps in the process of the optimizers that it has made.

    It knows the parameters that Transformers has it leave in 32 bits (those of embeddings) by their
    `id` and place, which the next trial's parameters may have, too, and it never lets go of paged
    memory.
    """
    if "bitsandbytes.optim" in sys.modules:
        optimizers: Any = sys.modules["bitsandbytes.optim"]
        functional: Any = sys.modules["bitsandbytes.functional"]
        optimizers.GlobalOptimManager.get_instance().initialize()
        functional.GlobalPageManager.get_instance().initialize()


def no_cast_warnings() -> None:
    """Leave out what 8-bit layers would say at every call: that they cast, which is their job."""
    logging.getLogger(_CAST_WARNING.module).setLevel(logging.ERROR)
