"""One adapter version in host memory, in the engine's form, whatever method trained it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from rayfin.errors import AdapterError


@dataclass(frozen=True, eq=False)
class LowRank:
    """A low-rank update B A of one layer, in float32.

    `a` is A [r, in]; `b` is B transposed [r, out], as slots hold it, with the scaling multiplied
    in.
    """

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        """Return r."""
        return len(self.a)


@dataclass(frozen=True, eq=False)
class HostAdapter:
    """One adapter version in host memory; all tensors are float32, contiguous and finite.

    A layer that appears in none of the mappings computes what the base does. The others, with each
    part that they lack left out, compute

        y = output_scale * (W (input_scale * x)) + bias + output_shift + B A x

    The scale stands before the base's bias, as DoRA's does. IA3's multiplies the bias too, and
    `output_shift` makes up for that where the layer has one.
    """

    ref: str
    method: str
    """PEFT's type in lower case, or `dora` or `rslora` where that is switched on."""
    lora: Mapping[str, LowRank] = field(default_factory=dict)
    """Module name in the base -> its update."""
    output_scale: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Module name -> [out]."""
    output_shift: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Module name -> [out]; for layers with an output_scale only."""
    input_scale: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Module name -> [in]."""
    tables: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Module name of the embeddings or the output head -> its own weights [tokens, hidden]."""
    prompt: torch.Tensor | None = None
    """Embeddings [virtual tokens, hidden] before the prompt's own."""
    prefix: torch.Tensor | None = None
    """Keys and values [layers, 2, key/value heads, virtual tokens, head_dim] before the row's."""

    @property
    def rank(self) -> int:
        """Return the largest rank among its layers; 0 where it has no low-rank update."""
        return max((one.rank for one in self.lora.values()), default=0)

    @property
    def virtual_tokens(self) -> int:
        """Return how many virtual tokens stand before a prompt."""
        if self.prompt is not None:
            return len(self.prompt)
        return 0 if self.prefix is None else self.prefix.shape[3]

    def check_range(self, dtype: torch.dtype) -> None:
        """Raises AdapterError where one of its values is infinite in `dtype`, the base's."""
        most = torch.finfo(dtype).max
        if most < torch.finfo(torch.bfloat16).max and any(
            tensor.abs().max().item() > most for tensor in self.tensors() if tensor.numel()
        ):
            raise AdapterError(
                f"adapter '{self.ref}' has values beyond {dtype}, which the served base computes "
                "in; serve the base with model.dtype=bfloat16 or float32"
            )

    @property
    def nbytes(self) -> int:
        """Return the bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor of the adapter."""
        for low_rank in self.lora.values():
            yield from (low_rank.a, low_rank.b)
        for mapping in (self.output_scale, self.output_shift, self.input_scale, self.tables):
            yield from mapping.values()
        yield from (tensor for tensor in (self.prompt, self.prefix) if tensor is not None)
