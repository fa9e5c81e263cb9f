"""Importing bitsandbytes without the compiler that it would load and not use."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable
from typing import Any

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

        torch.compile = plain
        try:
            importlib.import_module("bitsandbytes")
        finally:
            torch.compile = compiler
