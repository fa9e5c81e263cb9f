"""A linear layer's own product; for layers that are given the same input, all in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

# Up to so many tokens, MKL is about twice as fast on W x^T as on x W^T (measured on AVX2).
_FEW_TOKENS = 48

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of a module that transformers' models call one after the other with one tensor."""


class Family:
    """Plain layers whose products with one input are computed when the first of them is called.

    Their weights become views of one tensor, so that nothing takes more memory. A layer that is
    called with another tensor than the first one was computes its own product.
    """

    def __init__(self, linears: Sequence[torch.nn.Linear]) -> None:
        self._weight = torch.cat([linear.weight.detach() for linear in linears])
        self._spans: dict[torch.nn.Module, tuple[int, int]] = {}
        start = 0
        for linear in linears:
            stop = start + linear.out_features
            linear.weight = torch.nn.Parameter(self._weight[start:stop], requires_grad=False)
            self._spans[linear] = (start, stop)
            start = stop
        self._last = linears[-1]
        self._given: torch.Tensor | None = None
        self._products: torch.Tensor | None = None

    def product(self, linear: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        """W x + bias [tokens, out] of one of the layers, for hidden [..., in]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        start, stop = self._spans[linear]
        if start == 0:
            self._given, self._products = hidden, _times(self._weight, flat)
        if self._given is not hidden or self._products is None:
            return product(linear, flat)
        out = self._products[:, start:stop]
        if linear is self._last:
            self._given = self._products = None
        return _finished(out, linear.bias)


def product(linear: Any, flat: torch.Tensor) -> torch.Tensor:
    """The base's own W x + bias of flat [tokens, in]."""
    if is_plain(linear):
        return _finished(_times(linear.weight, flat), linear.bias)
    result: torch.Tensor = linear(flat)
    # bitsandbytes may hand its result back in a type of its own.
    return result.to(flat.dtype)


def is_plain(linear: Any) -> bool:
    """A float32 layer on CPU as torch has it."""
    weight = linear.weight
    return (
        type(linear) is torch.nn.Linear
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
    )


def _times(weight: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    if 1 < len(flat) <= _FEW_TOKENS:
        return torch.mm(weight, flat.t()).t()
    return functional.linear(flat, weight)


def _finished(out: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """With its bias; a token's values side by side, as adapters are added to them in place."""
    if bias is not None:
        return out + bias
    return out if out.stride(-1) == 1 else out.contiguous()
