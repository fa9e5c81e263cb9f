"""OFT: rotations of blocks of a layer's inputs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayfin.methods.adapted import PeftNamedMethod
from rayfin.methods.base import register
from rayfin.methods.layers import Linear
from rayfin.methods.rates import Rate


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

    def layer_parameters(self, linear: Linear, rank: int) -> float:
        return linear.inputs * (self._block(linear) - 1) / 2

    def layer_weights(self, linear: Linear) -> float:
        """Count a rotation as a series in a block's matrix: three of its powers, and the sum."""
        return 4 * linear.inputs * self._block(linear)

    def layer_flops(self, linear: Linear, rank: int) -> float:
        """Return FLOPs a token: products with the rotations forward, and of both gradients."""
        return 6 * linear.inputs * self._block(linear)

    def _block(self, linear: Linear) -> int:
        divisors = (n for n in range(1, linear.inputs + 1) if linear.inputs % n == 0)
        return min(divisors, key=lambda n: abs(n - self.oft_block_size))
