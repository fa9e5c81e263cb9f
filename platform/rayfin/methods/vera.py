"""VeRA: one frozen random pair of matrices for all layers, and learned factors of each."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayfin.methods.adapted import PeftNamedMethod
from rayfin.methods.base import register
from rayfin.methods.layers import targets
from rayfin.methods.rates import Rate
from rayfin.sizes import Sizes


@register
class VeraConfig(PeftNamedMethod):
    """Factors of a random update that all layers share (Kopiczko et al. 2023, arXiv:2310.11454)."""

    title = "VeRA"
    order = 10
    engines = ("transformers",)
    rate = Rate(value=2e-3, source="PEFT's comparison has 1e-3, and 3e-3 for the variant PVeRA")
    coordinates = (0.4, 1.6)
    capacity = "r"
    pefts = "VeraConfig"

    type: Literal["vera"]
    r: int = Field(256, ge=1)
    """Rank of the shared matrices, larger than LoRA's: a layer learns one number for each."""
    vera_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the shared matrices."""
    d_initial: float = Field(0.1, gt=0)
    """What the factors of the ranks begin with."""

    def update_parameters(self, sizes: Sizes) -> float:
        found = targets(self.target_modules, sizes)
        return sum(blocks * (it.outputs + self.r) for _, it, blocks in found)

    def kept_activations(self, sizes: Sizes, *, mixed_precision: bool) -> float:
        return self.update_parameters(sizes) / sizes.num_layers  # what each factor multiplies

    def flops_per_token(self, sizes: Sizes) -> float:
        """Products with both matrices forward, and to their inputs."""
        found = targets(self.target_modules, sizes)
        return sum(4 * blocks * self.r * (it.inputs + it.outputs) for _, it, blocks in found)
