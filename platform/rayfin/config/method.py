"""The ten fine-tuning methods' settings: a union on `type`, named as in PEFT."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """A frozen part of the configuration; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
"""One module name at least."""


class MethodSection(Section):
    quantization_bit: Literal[4, 8] | None = None
    """Load the base model in 4-bit NF4 (double quantisation) or 8-bit; null leaves it as it is."""


class FullConfig(MethodSection):
    """Every weight is trained."""

    type: Literal["full"]


class LowRankConfig(MethodSection):
    r: int = Field(8, ge=1)
    """Rank of the update matrices."""
    lora_alpha: float = Field(16, gt=0)
    """The update is scaled by lora_alpha / r (lora_alpha / sqrt(r) for rslora)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the update matrices."""
    target_modules: Literal["all-linear"] | Names = "all-linear"
    """Module names that get an update, or `all-linear`."""


class LoraConfig(LowRankConfig):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

    type: Literal["lora"]


class QloraConfig(LowRankConfig):
    """LoRA over a quantised base (Dettmers et al. 2023, arXiv:2305.14314)."""

    type: Literal["qlora"]
    quantization_bit: Literal[4, 8] = 4


class DoraConfig(LowRankConfig):
    """LoRA on the direction, magnitude apart (Liu et al. 2024, arXiv:2402.09353)."""

    type: Literal["dora"]


class RsloraConfig(LowRankConfig):
    """LoRA scaled by 1/sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732)."""

    type: Literal["rslora"]


class AdaloraConfig(MethodSection):
    """Ranks moved between layers during training (Zhang et al. 2023, arXiv:2303.10512)."""

    type: Literal["adalora"]
    init_r: int = Field(12, ge=1)
    """Rank of every update before the budget shrinks."""
    target_r: int = Field(8, ge=1)
    """Average rank that the budget shrinks to; at most init_r."""
    lora_alpha: float = Field(16, gt=0)
    """The update is scaled by lora_alpha / rank."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the update matrices."""
    target_modules: Literal["all-linear"] | Names = "all-linear"
    """Module names that get an update, or `all-linear`."""
    orth_reg_weight: float = Field(0.5, ge=0)
    """Weight of the penalty that keeps P and Q orthogonal."""


class Ia3Config(MethodSection):
    """Learned rescaling of keys, values and activations (Liu et al. 2022, arXiv:2205.05638)."""

    type: Literal["ia3"]
    target_modules: Names | None = None
    """Rescaled modules; null takes PEFT's choice for the architecture."""
    feedforward_modules: Names | None = None
    """Those of target_modules whose input, not output, is rescaled."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names_of_its_own(cls, value: object) -> object:
        if value == "all-linear":
            raise ValueError(
                "ia3 can't take 'all-linear', as it has to know which inputs to rescale; leave "
                "target_modules out for PEFT's choice, or give a list of names"
            )
        return value

    @model_validator(mode="after")
    def _feedforward_is_targeted(self) -> Ia3Config:
        beside = sorted(set(self.feedforward_modules or ()) - set(self.target_modules or ()))
        if self.target_modules is not None and beside:
            raise ValueError(
                f"feedforward_modules has '{beside[0]}', which target_modules lacks; "
                "add it there, or leave it out here"
            )
        return self


class PromptLearningConfig(MethodSection):
    num_virtual_tokens: int = Field(20, ge=1, le=1024)
    """Learned tokens put before every sequence."""


class PTuningConfig(PromptLearningConfig):
    """Virtual tokens from a small prompt encoder (Liu et al. 2021, arXiv:2103.10385)."""

    type: Literal["p_tuning"]
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    """Kind of prompt encoder."""
    encoder_hidden_size: int | None = Field(None, ge=1)
    """Width of the prompt encoder; null takes the model's embedding width."""
    encoder_num_layers: int = Field(2, ge=1)
    """Layers of an LSTM encoder (PEFT's MLP always has two hidden layers)."""
    encoder_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout inside an LSTM encoder."""


class PrefixTuningConfig(PromptLearningConfig):
    """Learned keys and values before every layer's own (Li & Liang 2021, arXiv:2101.00190)."""

    type: Literal["prefix_tuning"]
    prefix_projection: bool = False
    """Produce the prefix with an MLP while training."""
    encoder_hidden_size: int | None = Field(None, ge=1)
    """Width of that MLP; null takes the model's embedding width."""


class PromptTuningConfig(PromptLearningConfig):
    """Learned input embeddings (Lester et al. 2021, arXiv:2104.08691)."""

    type: Literal["prompt_tuning"]
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "SAMPLE_VOCAB"
    """Start from noise, from embeddings of random words, or from those of a text."""
    prompt_tuning_init_text: str | None = None
    """That text, for prompt_tuning_init: TEXT."""


MethodConfig = Annotated[
    FullConfig
    | LoraConfig
    | QloraConfig
    | DoraConfig
    | RsloraConfig
    | AdaloraConfig
    | Ia3Config
    | PTuningConfig
    | PrefixTuningConfig
    | PromptTuningConfig,
    Field(discriminator="type"),
]

METHOD_CONFIGS: dict[str, type[MethodSection]] = {
    "full": FullConfig,
    "lora": LoraConfig,
    "qlora": QloraConfig,
    "dora": DoraConfig,
    "rslora": RsloraConfig,
    "adalora": AdaloraConfig,
    "ia3": Ia3Config,
    "p_tuning": PTuningConfig,
    "prefix_tuning": PrefixTuningConfig,
    "prompt_tuning": PromptTuningConfig,
}
