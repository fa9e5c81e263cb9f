"""OFT: rotations of blocks of a layer's inputs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayfin.methods.adapted import PeftNamedMethod
from rayfin.methods.base import register
from rayfin.methods.layers import Linear, targets
from rayfin.methods.rates import Rate
from rayfin.sizes import Sizes


@register
class OftConfig(PeftNamedMethod):
    """Rotations of each layer's inputs (Qiu et al. 2023, arXiv:2306.07280)."""

    title = "OFT"
    order = 12
    trains = "rotations"
    engines = ()
    rate = Rate(of_lora=True, source="PEFT's comparison gives it LoRA's rate")
    coordinates = (0.6, 0.6)
    conv1d = False
    capacity = "oft_block_size"
    capacity_label = "block "
    pefts = "OFTConfig"

    type: Literal["oft"]
    oft_block_size: int = Field(32, ge=2)
    """Inputs that are rotated together; PEFT takes the nearest divisor of a layer's inputs."""
    module_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the blocks that a training step leaves unrotated."""

    def update_parameters(self, sizes: Sizes) -> float:
        found = targets(self.target_modules, sizes)
        return sum(n * it.inputs * (self._block(it) - 1) / 2 for _, it, n in found)

    def kept_weights(self, sizes: Sizes) -> float:
        """A rotation is a series in a matrix of each block: three of its powers, and the sum."""
        found = targets(self.target_modules, sizes)
        return sum(4 * n * it.inputs * self._block(it) for _, it, n in found) / sizes.num_layers

    def flops_per_token(self, sizes: Sizes) -> float:
        """Products with the rotations, forward, to their inputs, and to them."""
        return 6 * self.kept_weights(sizes) * sizes.num_layers / 4

    def _block(self, linear: Linear) -> int:
        divisors = (n for n in range(1, linear.inputs + 1) if linear.inputs % n == 0)
        return min(divisors, key=lambda n: abs(n - self.oft_block_size))
