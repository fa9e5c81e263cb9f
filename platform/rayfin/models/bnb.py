"""Importing bitsandbytes without the compiler that it would load and never use."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock


def import_bitsandbytes() -> None:
    """To be called before PEFT is imported, which imports bitsandbytes wherever it is installed.

    bitsandbytes (0.50) wraps four fallback kernels in `torch.compile` as it is imported. That loads
    torch._inductor: 1.5 of the 5.6 seconds that a worker's imports take, and 44 MB. CPU and CUDA
    have kernels of their own, and elsewhere the plain ones compute the same.
    """
    import torch

    with mock.patch.object(torch, "compile", _plain):
        importlib.import_module("bitsandbytes")


def _plain(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    """Stands for `torch.compile`, called or used as a decorator with options."""
    return function or (lambda decorated: decorated)
