"""The base's product of a linear layer, joint for layers that are given the same input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from rayfin.serving.engine import int8
from rayfin.serving.engine.int8 import Int8Linear

Times = Callable[[torch.Tensor], torch.Tensor]

# Up to so many tokens, MKL is about twice as fast on W x^T as on x W^T (measured on AVX2).
_FEW_TOKENS = 48

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of a module that transformers' models call one after the other with one tensor."""


class JointProduct:
    """Computes the products of several layers with one input when the first of them is called.

    A layer that is called with another tensor than the first one was computes its own product.
    """

    def __init__(
        self, linears: Sequence[torch.nn.Module], starts: Sequence[int], times: Times
    ) -> None:
        """Keep `times`, which maps [tokens, in] to all layers' outputs; those of a layer begin at
        its start.
        """
        self._times = times
        self._starts = dict(zip(linears, starts, strict=True))
        self._last = linears[-1]
        self._given: torch.Tensor | None = None
        self._products: torch.Tensor | None = None

    def product(self, linear: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Return W x + bias [tokens, out] of one of the layers, for hidden [..., in]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        start = self._starts[linear]
        if start == 0:
            self._given, self._products = hidden, self._times(flat)
        if self._given is not hidden or self._products is None:
            return product(linear, flat)
        out = self._products[:, start : start + int(linear.out_features)]  # type: ignore[arg-type]
        if linear is self._last:
            self._given = self._products = None
        return _finished(out, linear.bias)  # type: ignore[arg-type]


def join_layers(linears: Sequence[torch.nn.Module]) -> JointProduct | None:
    """Make the layers' weights views of one, for no more memory; None for layers of other kinds."""
    if all(isinstance(one, Int8Linear) for one in linears):
        rounded, starts = int8.join(linears)  # type: ignore[arg-type]
        kernel: int8.Int8Kernel = linears[0].kernel  # type: ignore[assignment]
        return JointProduct(linears, starts, lambda flat: kernel.times(flat, rounded))
    if not all(is_plain(one) for one in linears):
        return None
    weight = torch.cat([one.weight.detach() for one in linears])  # type: ignore[operator]
    starts, start = [], 0
    for one in linears:
        stop = start + int(one.out_features)  # type: ignore[arg-type]
        one.weight = torch.nn.Parameter(weight[start:stop], requires_grad=False)
        starts.append(start)
        start = stop
    return JointProduct(linears, starts, lambda flat: _times(weight, flat))


def product(linear: Any, flat: torch.Tensor) -> torch.Tensor:
    """Return the base's own W x + bias of flat [tokens, in]."""
    if is_plain(linear):
        return _finished(_times(linear.weight, flat), linear.bias)
    result: torch.Tensor = linear(flat)
    # bitsandbytes may hand its result back in a type of its own.
    return _finished(result.to(flat.dtype), None)


def is_plain(linear: Any) -> bool:
    """Return whether a layer is a float32 one on CPU as torch has it."""
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
    """Add the bias, and lay a token's values side by side: adapters are added in place."""
    if bias is not None:
        out = out + bias
    return out if out.stride(-1) == 1 else out.contiguous()
