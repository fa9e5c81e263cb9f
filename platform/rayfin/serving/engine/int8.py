"""Linear layers with 8-bit weights on CPU; their inputs are made integers as they come."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from rayfin.serving.engine import native

_WIDEST = 1
_OUTPUTS = 16
_GROUP = 128
_WEIGHT = 127
_INPUT = 32767
_AT_ONCE = 256 * _OUTPUTS
"""Outputs that are rounded together; more would take memory for nothing."""


class Int8Kernel:
    """The product x W^T over integers, in C; raises OSError where it can't be had."""

    def __init__(self, most: int = _WIDEST) -> None:
        """Load the kernel; `most` is the widest registers to use, 1 for AVX2, 0 for what all
        processors have.
        """
        library = native.library("int8", OUTPUTS=_OUTPUTS, GROUP=_GROUP, LARGEST=_INPUT)
        self.variant: int = library.native_variant(most)
        self.parallel = bool(library.native_threads())
        """Large products use torch's threads."""
        self._times = library.int8_times
        pointer, size = ctypes.c_void_p, ctypes.c_ssize_t
        self._times.argtypes = [
            *(pointer, size, size, size, pointer, pointer, pointer, pointer, size, pointer, size),
            *(ctypes.c_int, ctypes.c_int),
        ]
        self._times.restype = None

    def times(self, x: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
        """Multiply [tokens, in] float32 -> [tokens, blocks * 16]: `weight` has its outputs padded
        to that.

        Each token is rounded to 16 bits of its own largest value: what one token gives does not
        depend on those beside it, not in a bit.
        """
        if x.dtype != torch.float32 or x.shape[1] != weight.inputs:
            raise ValueError(
                f"tokens are {x.dtype} of {x.shape[1]} values, not float32 of {weight.inputs}"
            )
        if x.stride(1) != 1:
            x = x.contiguous()
        tokens, blocks = len(x), len(weight.values)
        out = x.new_empty(tokens, blocks * _OUTPUTS)
        rounded = x.new_empty(tokens, 2 * weight.values.shape[1], dtype=torch.int16)
        scales = x.new_empty(tokens)
        self._times(
            *(x.data_ptr(), x.stride(0), tokens, x.shape[1], rounded.data_ptr()),
            *(scales.data_ptr(), weight.values.data_ptr(), weight.scales.data_ptr(), blocks),
            *(out.data_ptr(), out.stride(0), torch.get_num_threads(), self.variant),
        )
        return out


class Int8Weight:
    """A weight in the kernel's order; values: int8 [blocks, pairs, 16, 2], scales: [blocks, groups,
    16].

    A block is 16 outputs, a pair two inputs, a group 128 inputs of an output that share a scale.
    """

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, inputs: int) -> None:
        self.values, self.scales, self.inputs = values, scales, inputs

    @classmethod
    def rounded(cls, weight: torch.Tensor) -> Int8Weight:
        """Round [out, in] to the nearest: each group to 127 steps either way of its largest."""
        starts = range(0, len(weight), _AT_ONCE)
        return cls.joined([cls._rounded(weight[at : at + _AT_ONCE]) for at in starts])

    @classmethod
    def _rounded(cls, weight: torch.Tensor) -> Int8Weight:
        outputs, inputs = weight.shape
        pairs, groups = -(-inputs // 2), -(-inputs // _GROUP)
        padded = functional.pad(
            weight.float(), (0, groups * _GROUP - inputs, 0, -outputs % _OUTPUTS)
        )
        grouped = padded.view(len(padded), groups, _GROUP)
        scales = grouped.abs().amax(-1) / _WEIGHT
        values = (grouped / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round_()
        values = values.to(torch.int8).view(-1, _OUTPUTS, groups * _GROUP // 2, 2)
        return cls(
            values[:, :, :pairs].transpose(1, 2).contiguous(),
            scales.view(-1, _OUTPUTS, groups).transpose(1, 2).contiguous(),
            inputs,
        )

    @classmethod
    def joined(cls, weights: Sequence[Int8Weight]) -> Int8Weight:
        """Return the blocks of all of them, one after the other."""
        return cls(
            torch.cat([weight.values for weight in weights]),
            torch.cat([weight.scales for weight in weights]),
            weights[0].inputs,
        )

    def dense(self) -> torch.Tensor:
        """Return float32 weights [outputs padded to whole blocks, inputs]."""
        values = self.values.transpose(1, 2).flatten(0, 1).flatten(1)
        scales = self.scales.transpose(1, 2).flatten(0, 1)
        dense = values * scales.repeat_interleave(_GROUP, 1)[:, : values.shape[1]]
        return dense[:, : self.inputs]

    def part(self, start: int, stop: int) -> Int8Weight:
        """Return some of the blocks, in the same memory."""
        return Int8Weight(self.values[start:stop], self.scales[start:stop], self.inputs)


class Int8Linear(torch.nn.Module):
    """A linear layer over weights in int8."""

    def __init__(self, linear: Any, kernel: Int8Kernel) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.rounded = Int8Weight.rounded(linear.weight.detach())
        bias = getattr(linear, "bias", None)
        self.bias = None if bias is None else bias.detach().float()
        self.kernel = kernel
        # What asks for the device and type of a layer looks at its weight.
        self.weight = torch.empty(0)

    def forward(self, flat: torch.Tensor) -> torch.Tensor:
        result = self.kernel.times(flat, self.rounded)[:, : self.out_features]
        return result if self.bias is None else result + self.bias


def join(linears: Sequence[Int8Linear]) -> tuple[Int8Weight, list[int]]:
    """Return one weight for all layers, of which theirs become parts, and where each one's outputs
    start.
    """
    weights = [linear.rounded for linear in linears]
    joined = Int8Weight.joined(weights)
    starts, start = [], 0
    for linear, weight in zip(linears, weights, strict=True):
        stop = start + len(weight.values)
        linear.rounded = joined.part(start, stop)
        starts.append(start * _OUTPUTS)
        start = stop
    return joined, starts
