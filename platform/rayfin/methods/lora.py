"""LoRA and its variants."""

from __future__ import annotations

from typing import Any, Literal

from rayfin.methods.base import register
from rayfin.methods.layers import Linear
from rayfin.methods.low_rank import LowRankConfig
from rayfin.methods.rates import Rate


@register
class LoraConfig(LowRankConfig):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

    title = "LoRA"
    order = 1
    engines = ("transformers", "vllm")
    rate = Rate(
        of_lora=True, source="by size: QLoRA's README, TRL's guide and PEFT's quicktour (rates.py)"
    )
    coordinates = (0.0, 0.0)

    type: Literal["lora"]

    def computed(self) -> dict[str, Any]:
        """LoRA over a quantised base is QLoRA, by whichever name it was asked for."""
        found = super().computed()
        return found | {"type": "qlora"} if self.quantization_bit else found


@register
class QloraConfig(LowRankConfig):
    """LoRA over a quantised base (Dettmers et al. 2023, arXiv:2305.14314)."""

    title = "QLoRA"
    order = 2
    engines = ("transformers", "vllm")
    rate = Rate(of_lora=True, source="QLoRA's README")
    coordinates = (0.2, 0.0)

    type: Literal["qlora"]
    quantization_bit: Literal[4, 8] = 4
    """Load the base model in 4-bit NF4 (double quantisation) or 8-bit."""


@register
class DoraConfig(LowRankConfig):
    """LoRA on the direction, magnitude apart (Liu et al. 2024, arXiv:2402.09353)."""

    title = "DoRA"
    order = 3
    engines = ("transformers",)
    rate = Rate(
        value=0.75,
        of_lora=True,
        source="'slightly lower than that of LoRA' (github.com/NVlabs/DoRA); by how much is a "
        "convention",
    )
    coordinates = (0.0, -0.2)

    type: Literal["dora"]

    def _variant(self) -> dict[str, Any]:
        return {"use_dora": True}

    def layer_parameters(self, linear: Linear, rank: int) -> float:
        """Return the number of trained parameters, a magnitude for each output among them."""
        return super().layer_parameters(linear, rank) + linear.outputs

    def layer_activations(self, linear: Linear, rank: int) -> float:
        """Return A's output and both products, which a magnitude's gradient needs."""
        return rank + 2 * linear.outputs


@register
class RsloraConfig(LowRankConfig):
    """LoRA scaled by 1/sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732)."""

    title = "rank-stabilised LoRA"
    order = 4
    engines = ("transformers", "vllm")
    rate = Rate(of_lora=True, source="PEFT's comparison has one rate for it and LoRA")
    coordinates = (0.0, 0.2)
    usual_alpha = 8.0  # LoRA's scale, 2, at rank 16: a convention
    scale_exponent = 0.5

    type: Literal["rslora"]

    def _variant(self) -> dict[str, Any]:
        return {"use_rslora": True}
