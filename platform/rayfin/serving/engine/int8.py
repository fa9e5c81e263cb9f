"""Linear layers with 8-bit weights on CPU, their inputs quantised as they come."""

from __future__ import annotations

import warnings
from typing import Any

import torch


class Int8Linear(torch.nn.Module):
    """A linear layer's weights in int8, one scale an output channel (symmetric, round to nearest).

    Activations are quantised as they come (dynamic quantisation; FBGEMM or oneDNN), each token by
    its own largest value: what one row computes does not depend on those beside it.
    """

    def __init__(self, linear: Any) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.out_features, self.in_features = weight.shape
        # AVX2 adds pairs of 8-bit products in 16 bits: inputs get 7 bits there (reduce_range).
        scales = weight.abs().amax(1).clamp_(min=1e-8).double() / 127
        zeros = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():
            # torch wants to drop this tensor type one day; its fast CPU kernels take no other yet.
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor, torch.quantize_per_chann")
            quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        bias = getattr(linear, "bias", None)
        self.bias = None if bias is None else bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack(quantised, None)
        # What asks for the device and type of a layer looks at its weight.
        self.weight = torch.empty(0)

    def forward(self, flat: torch.Tensor) -> torch.Tensor:
        # The kernel has one scale for all tokens, from the least value to the largest: they are
        # brought to the same size before it, and a last row of -1 and 1 sets the scale.
        largest = flat.abs().amax(-1, keepdim=True).clamp_(min=1e-12)
        even = flat.new_zeros(len(flat) + 1, flat.shape[1])
        torch.div(flat, largest, out=even[:-1])
        even[-1, 0], even[-1, -1] = -1.0, 1.0
        torch.nan_to_num_(even, 0.0, 0.0, 0.0)  # such a token is no number again below
        result: torch.Tensor = torch.ops.quantized.linear_dynamic(even, self.packed, True)[:-1]
        result *= largest
        return result if self.bias is None else result + self.bias
