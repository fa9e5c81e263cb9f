"""VeRA: one frozen random pair of matrices for all layers, and learned factors of each."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayfin.methods.adapted import PeftNamedMethod
from rayfin.methods.base import register
from rayfin.methods.layers import Linear
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
    first_weights = ("d_initial",)
    pefts = "VeraConfig"

    type: Literal["vera"]
    r: int = Field(256, ge=1)
    """Rank of the shared matrices, larger than LoRA's: a layer learns one number for each."""
    vera_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the shared matrices."""
    d_initial: float = Field(0.1, gt=0)
    """The initial value of the factors of the ranks."""

    def layer_parameters(self, linear: Linear, rank: int) -> float:
        return linear.outputs + rank

    def layer_flops(self, linear: Linear, rank: int) -> float:
        """Return FLOPs a token: products with both matrices forward, and to their inputs."""
        return 4 * rank * (linear.inputs + linear.outputs)

    def kept_activations(self, sizes: Sizes, *, mixed_precision: bool) -> float:
        """Return the numbers a token of one block: what each factor multiplies."""
        return self._over_layers(self.layer_parameters, sizes) / sizes.num_layers
