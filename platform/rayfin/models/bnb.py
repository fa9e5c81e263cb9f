"""bitsandbytes without the compiler that it would load and not use, and computing as it stores."""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module

_IMPORTING = threading.Lock()


def import_bitsandbytes() -> None:
    """To be called before PEFT is imported, which imports bitsandbytes wherever it is installed.

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
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        torch.compile = plain
        try:
            importlib.import_module("bitsandbytes")
        finally:
            torch.compile = compiler


def without_packing(model: Module) -> None:
    """4-bit layers of `model` keep their weights as they are, on processors with bfloat16 too.

    There bitsandbytes (0.50) repacks them in place at the first call without gradients, for a
    product that rounds to bfloat16 and has no derivative: a model that was evaluated before it is
    trained would train its last layers only, and other processors would compute something else.
    """
    name = "support_avx512bf16_for_cpu"
    for module in model.modules():
        if hasattr(module, name):
            setattr(module, name, False)
