"""What methods that adapt linear layers share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from rayfin.methods.base import MethodConfig, Trained
from rayfin.methods.layers import Linear, targets
from rayfin.sizes import Sizes

if TYPE_CHECKING:
    from peft import PeftConfig

Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
"""One module name at least."""

TARGET_MODULES = "all-linear"
"""What low-rank methods adapt: every linear layer but the output head.

QLoRA needed all of them to match full fine-tuning, and LoRA Without Regret finds that attention
alone does worse even at a rank that makes up for the parameters.
"""


class LowRankMethod(MethodConfig):
    """What methods with an update B A share, whatever their settings are called."""

    trains: ClassVar[Trained] = "low rank"
    quantized_base = True
    packing = True
    gradient_checkpointing = True
    merging = True
    # 32 whatever the rank, the default of LoRA Without Regret's authors (tinker-cookbook); QLoRA
    # too keeps one, 16. With alpha / r the best learning rate then hardly moves with the rank. The
    # other convention, alpha = 2 r (PEFT's comparison), is the same at rank 16 and takes larger
    # steps above it.
    usual_alpha: ClassVar[float | None] = 32.0
    module_settings: ClassVar[tuple[str, ...]] = ("target_modules",)

    if TYPE_CHECKING:
        target_modules: Literal["all-linear"] | Names

    @property
    def rank(self) -> int:
        return int(getattr(self, str(self.capacity)))

    def adapted(self, sizes: Sizes) -> Iterator[tuple[str, Linear, dict[int, float]]]:
        """Each kind of adapted layer: its name, and for each rank how many blocks have it."""
        for name, linear, blocks in targets(self.target_modules, sizes):
            yield name, linear, {self.rank: blocks}

    def extra_parameters(self, linear: Linear) -> int:
        """Trained parameters of one layer beside A and B."""
        return 0

    def extra_activations(self, linear: Linear) -> int:
        """Numbers a token that autograd keeps of one layer, beside A's input and output."""
        return 0

    def trained_parameters(self, sizes: Sizes) -> int:
        total = 0.0
        for _, linear, ranks in self.adapted(sizes):
            for rank, blocks in ranks.items():
                total += blocks * rank * (linear.inputs + linear.outputs)
                total += blocks * self.extra_parameters(linear)
        return round(total)

    def kept_activations(self, sizes: Sizes, *, mixed_precision: bool) -> float:
        numbers = 0.0
        inputs: dict[str, float] = {}
        for name, linear, ranks in self.adapted(sizes):
            share = sum(ranks.values()) / sizes.num_layers
            # What several layers read is kept once, unless dropout or autocast copies it for each.
            copied = getattr(self, "lora_dropout", 0) > 0 or mixed_precision
            if copied or linear.reads != "heads":  # attention's output, which is kept already
                inputs[name if copied else linear.reads] = share * linear.inputs
            for rank, blocks in ranks.items():
                numbers += blocks / sizes.num_layers * (rank + self.extra_activations(linear))
        return numbers + sum(inputs.values())

    def flops_per_token(self, sizes: Sizes) -> float:
        """Products with A and B forward, to their inputs, and to their weights."""
        return 6 * self.trained_parameters(sizes)


class PeftNamedMethod(LowRankMethod):
    """A method whose settings are those of one of PEFT's configurations, by the same names."""

    usual_alpha = None
    pefts: ClassVar[str]
    """The class of PEFT's configuration."""

    target_modules: Literal["all-linear"] | Names = "all-linear"
    """Module names that get an update, or `all-linear`."""

    def peft_config(self, max_steps: int, tokenizer_path: str) -> PeftConfig:
        import peft

        settings = self.model_dump(exclude={"type", "quantization_bit"})
        settings["target_modules"] = listed(self.target_modules)
        config: PeftConfig = getattr(peft, self.pefts)(task_type="CAUSAL_LM", **settings)
        return config

    @classmethod
    def usual(cls, rank: int, length: int) -> dict[str, Any]:
        """PEFT's own defaults."""
        capacity = str(cls.capacity)
        default = cls.model_fields[capacity].default
        return {capacity: default, "target_modules": TARGET_MODULES}


def listed(names: str | tuple[str, ...] | None) -> str | list[str] | None:
    """Module names as PEFT takes them."""
    return list(names) if isinstance(names, tuple) else names


def whole(value: float) -> float | int:
    """PEFT (and vLLM's reader of its files) declare lora_alpha as int."""
    return int(value) if value == int(value) else value
