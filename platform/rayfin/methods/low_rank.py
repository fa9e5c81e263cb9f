"""LoRA and its variants: an update B A beside the weight of every adapted linear layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from rayfin.methods.base import MethodConfig, register
from rayfin.methods.layers import Linear, targets
from rayfin.methods.rates import Rate
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

    trains = "low rank"
    quantized_base = True
    packing = True
    gradient_checkpointing = True
    merging = True
    # 32 whatever the rank, the default of LoRA Without Regret's authors (tinker-cookbook); QLoRA
    # too keeps one, 16. With alpha / r the best learning rate then hardly moves with the rank. The
    # other convention, alpha = 2 r (PEFT's comparison), is the same at rank 16 and takes larger
    # steps above it.
    usual_alpha: ClassVar[float | None] = 32.0
    module_settings = ("target_modules",)

    if TYPE_CHECKING:
        lora_dropout: float
        target_modules: Literal["all-linear"] | Names

    @property
    def rank(self) -> int:
        return int(getattr(self, str(self.capacity)))

    def adapted(self, sizes: Sizes) -> Iterator[tuple[Linear, float]]:
        """Each kind of adapted layer, and the number of blocks that have one."""
        return ((it, blocks) for _, it, blocks in targets(self.target_modules, sizes))

    def extra_parameters(self, linear: Linear) -> int:
        """Trained parameters of one layer beside A and B."""
        return 0

    def extra_activations(self, linear: Linear) -> int:
        """Numbers a token that autograd keeps of one layer, beside A's input and output."""
        return 0

    def trained_parameters(self, sizes: Sizes) -> int:
        total = 0.0
        for linear, blocks in self.adapted(sizes):
            total += blocks * self.rank * (linear.inputs + linear.outputs)
            total += blocks * self.extra_parameters(linear)
        return round(total)

    def kept_activations(self, sizes: Sizes, *, mixed_precision: bool) -> float:
        numbers = 0.0
        inputs: dict[str, float] = {}
        for name, linear, blocks in targets(self.target_modules, sizes):
            share = blocks / sizes.num_layers
            # What several layers read is kept once, unless dropout or autocast copies it for each.
            copied = self.lora_dropout > 0 or mixed_precision
            if copied or linear.reads != "heads":  # attention's output, which is kept already
                inputs[name if copied else linear.reads] = share * linear.inputs
            numbers += share * (self.rank + self.extra_activations(linear))
        return numbers + sum(inputs.values())

    def flops_per_token(self, sizes: Sizes) -> float:
        """Products with A and B forward, to their inputs, and to their weights."""
        return 6 * self.trained_parameters(sizes)


class LowRankConfig(LowRankMethod):
    capacity = "r"
    synonyms = {  # noqa: RUF012
        "r": ("lora_rank", "rank", "lora_r"),
        "lora_alpha": ("alpha",),
        "lora_dropout": ("dropout",),
    }

    r: int = Field(8, ge=1)
    """Rank of the update matrices."""
    lora_alpha: float = Field(16, gt=0)
    """The update is scaled by lora_alpha / r (lora_alpha / sqrt(r) for rslora)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the update matrices."""
    target_modules: Literal["all-linear"] | Names = "all-linear"
    """Module names that get an update, or `all-linear`."""

    def peft_config(self, max_steps: int, tokenizer_path: str) -> PeftConfig:
        import peft

        return peft.LoraConfig(
            task_type=peft.TaskType.CAUSAL_LM,
            r=self.r,
            lora_alpha=whole(self.lora_alpha),  # type: ignore[arg-type]
            lora_dropout=self.lora_dropout,
            target_modules=listed(self.target_modules),
            **self._variant(),
        )

    def _variant(self) -> dict[str, Any]:
        """What switches the variant on in PEFT."""
        return {}

    @classmethod
    def usual(cls, rank: int, length: int) -> dict[str, Any]:
        return {**cls.of_capacity(rank), "target_modules": TARGET_MODULES}

    @classmethod
    def of_capacity(cls, capacity: int) -> dict[str, Any]:
        return {"r": capacity, "lora_alpha": cls.usual_alpha}

    @classmethod
    def is_pefts(cls, name: str, config: Mapping[str, Any], bits: int | None) -> bool:
        return name == "lora" and cls is _variant_of(config, bits)


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


@register
class LoraConfig(LowRankConfig):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

    title = "LoRA"
    place = 1
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
    place = 2
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
    place = 3
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

    def extra_parameters(self, linear: Linear) -> int:
        """A magnitude for each output."""
        return linear.outputs

    def extra_activations(self, linear: Linear) -> int:
        """A magnitude's gradient needs both products."""
        return 2 * linear.outputs


@register
class RsloraConfig(LowRankConfig):
    """LoRA scaled by 1/sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732)."""

    title = "rank-stabilised LoRA"
    place = 4
    engines = ("transformers", "vllm")
    rate = Rate(of_lora=True, source="PEFT's comparison has one rate for it and LoRA")
    coordinates = (0.0, 0.2)
    usual_alpha = 8.0  # LoRA's scale, 2, at rank 16: a convention
    scale_exponent = 0.5

    type: Literal["rslora"]

    def _variant(self) -> dict[str, Any]:
        return {"use_rslora": True}


def _variant_of(config: Mapping[str, Any], bits: int | None) -> type[LowRankConfig]:
    """The method whose adapter_config.json of PEFT's type LORA `config` is."""
    if config.get("use_dora"):
        return DoraConfig
    if config.get("use_rslora"):
        return RsloraConfig
    return QloraConfig if bits == 4 else LoraConfig


def listed(names: str | tuple[str, ...] | None) -> str | list[str] | None:
    """Module names as PEFT takes them."""
    return list(names) if isinstance(names, tuple) else names


def whole(value: float) -> float | int:
    """PEFT (and vLLM's reader of its files) declare lora_alpha as int."""
    return int(value) if value == int(value) else value
