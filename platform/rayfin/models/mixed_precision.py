"""Products of frozen weights in bfloat16, and all else in float32, on processors."""

from __future__ import annotations

import torch
from torch.nn import functional


class BFloat16Linear(torch.nn.Linear):
    """A frozen linear layer whose weight is bfloat16, between activations of any type.

    The inputs are rounded for the product, the outputs are given back in their type. The weight is
    rounded once and not in every step as under autocast, and nothing but the product is bfloat16:
    attention, norms, adapters, the loss and their gradients stay as they were.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        dtype = self.weight.dtype
        return functional.linear(inputs.to(dtype), self.weight, self.bias).to(inputs.dtype)


def use_bfloat16_products(model: torch.nn.Module) -> None:
    """Round the weights of all linear layers of a frozen model to bfloat16, in place.

    Weights of checkpoints that are saved in bfloat16 stay as they are, to the last bit. A head that
    is tied to the embeddings has a weight of its own afterwards.
    """
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.weight = _rounded(module.weight)
            if module.bias is not None:
                module.bias = _rounded(module.bias)
            module.__class__ = BFloat16Linear


def _rounded(parameter: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(parameter.data.to(torch.bfloat16), requires_grad=False)
