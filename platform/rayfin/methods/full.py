"""Full fine-tuning."""

from __future__ import annotations

from typing import Literal

from rayfin.methods.base import Incompatibility, MethodConfig, register
from rayfin.methods.layers import block_linears
from rayfin.methods.rates import Rate
from rayfin.sizes import Sizes


@register
class FullConfig(MethodConfig):
    """Every weight is trained."""

    title = "full fine-tuning"
    order = 0
    trains = "weights"
    quantized_base = False
    packing = True
    gradient_checkpointing = True
    merging = False
    engines = ("transformers", "vllm")
    rate = Rate(
        value=0.1,
        of_lora=True,
        source="a tenth of LoRA's by LoRA Without Regret; that makes Alpaca's 2e-5 for LLaMA-7B "
        "(github.com/tatsu-lab/stanford_alpaca), TRL's default too",
    )
    coordinates = (1.0, 0.0)
    changes_base = True
    aliases = ("full_finetuning", "full_fine_tuning", "full_ft", "fft")

    type: Literal["full"]

    def continuation_refusal(self) -> Incompatibility:
        return Incompatibility(
            f"method.init_from={self.init_from}",
            "it trains the base's own weights, and saves a whole model and no adapter",
            "name the directory of the model to continue by model.name",
        )

    def peft_config(self, max_steps: int, tokenizer_path: str) -> None:
        return None

    def trained_parameters(self, sizes: Sizes) -> int:
        return sizes.parameters

    def kept_activations(self, sizes: Sizes, *, mixed_precision: bool) -> float:
        """Weights that are trained need their inputs, norms too."""
        linears = block_linears(sizes).values()
        read = {linear.reads: linear.inputs for linear in linears if linear.reads != "heads"}
        return 2 * sizes.hidden_size + sum(read.values())
