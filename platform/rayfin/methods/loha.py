"""LoHa: an update that is the elementwise product of two low-rank ones."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayfin.methods.adapted import PeftNamedMethod
from rayfin.methods.base import register
from rayfin.methods.layers import Linear
from rayfin.methods.rates import Rate


@register
class LohaConfig(PeftNamedMethod):
    """Products of two low-rank updates (Hyeon-Woo et al. 2021, arXiv:2108.06098)."""

    title = "LoHa"
    order = 11
    quantized_base = False  # PEFT takes the shape of the update from that of the stored weights
    engines = ()
    rate = Rate(of_lora=True, source="PEFT's comparison gives it LoRA's rate")
    coordinates = (0.4, -0.4)
    conv1d = False
    fragments_heap = True
    pefts = "LoHaConfig"

    type: Literal["loha"]
    r: int = Field(8, ge=1)
    """Rank of each of the two updates; their product's is up to the square of it."""
    alpha: float = Field(8, gt=0)
    """The product is scaled by alpha / r."""
    rank_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the outputs that a training step leaves without an update."""

    def strategy_refusal(self, strategy: str) -> str | None:
        if strategy != "deepspeed-zero3":
            return None
        return (
            "LoHa takes the shape of its update from the base's weights, of which a worker of "
            "ZeRO-3 has a part; use deepspeed-zero2, fsdp or ddp"
        )

    def layer_parameters(self, linear: Linear, rank: int) -> float:
        return 2 * super().layer_parameters(linear, rank)

    def layer_weights(self, linear: Linear) -> float:
        """Return the numbers of the product, which is made anew in each step."""
        return linear.inputs * linear.outputs

    def layer_flops(self, linear: Linear, rank: int) -> float:
        """Return FLOPs a token: products with that, forward, to their inputs, and to it."""
        return 6 * linear.inputs * linear.outputs
