"""Methods that learn virtual tokens, or their keys and values, before every sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from rayfin.methods.base import Incompatibility, MethodConfig, Trained, register
from rayfin.methods.rates import Rate
from rayfin.sizes import Sizes

if TYPE_CHECKING:
    from peft import PeftConfig

_TOKENS = 20
"""Number of virtual tokens to start from, that of PEFT's guide to prompt-based methods."""


class PromptLearningConfig(MethodConfig):
    trains: ClassVar[Trained] = "virtual tokens"
    quantized_base = True
    packing = False  # a packed row has many samples and would get one prompt
    gradient_checkpointing = True
    merging = False
    engines = ("transformers",)
    virtual_tokens = True
    capacity = "num_virtual_tokens"

    num_virtual_tokens: int = Field(20, ge=1, le=1024)
    """Learned tokens put before every sequence."""

    @property
    def row_tokens(self) -> int:
        return self.num_virtual_tokens

    @property
    def positions(self) -> int:
        return self.num_virtual_tokens

    @classmethod
    def usual(cls, rank: int, length: int) -> dict[str, Any]:
        # They are part of the sample's length, which short samples need for themselves.
        return {"num_virtual_tokens": min(_TOKENS, length // 2)}


@register
class PTuningConfig(PromptLearningConfig):
    """Virtual tokens from a small prompt encoder (Liu et al. 2021, arXiv:2103.10385)."""

    title = "P-Tuning"
    order = 7
    rate = Rate(
        value=2e-3,
        spread=20.0,
        source="PEFT's comparison has 1e-4, its guide 3e-2 (bloomz-560m): the mean of their "
        "logarithms",
    )
    coordinates = (2.0, 0.0)
    aliases = ("ptuning",)

    type: Literal["p_tuning"]
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    """Kind of prompt encoder."""
    encoder_hidden_size: int | None = Field(None, ge=1)
    """Width of the prompt encoder; null takes the model's embedding width."""
    encoder_num_layers: int = Field(2, ge=1)
    """Layers of an LSTM encoder (PEFT's MLP always has two hidden layers)."""
    encoder_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout inside an LSTM encoder."""

    def peft_config(self, max_steps: int, tokenizer_path: str) -> PeftConfig:
        import peft

        return peft.PromptEncoderConfig(
            num_virtual_tokens=self.num_virtual_tokens,
            encoder_reparameterization_type=self.encoder_reparameterization_type,
            encoder_hidden_size=self.encoder_hidden_size,  # type: ignore[arg-type]
            encoder_num_layers=self.encoder_num_layers,
            encoder_dropout=self.encoder_dropout,
        )

    def computed(self) -> dict[str, Any]:
        mlp = self.encoder_reparameterization_type == "MLP"
        return super().computed() | self._idle(mlp, "encoder_num_layers", "encoder_dropout")

    @property
    def adapter_is_whole(self) -> bool:
        """The file holds what the prompt encoder put out, and not the encoder, which is trained."""
        return False

    def trained_parameters(self, sizes: Sizes) -> int:
        """Count PEFT's PromptEncoder: an embedding, then an MLP, or an LSTM and an MLP."""
        width = sizes.hidden_size
        embedding = self.num_virtual_tokens * width
        hidden = self.encoder_hidden_size or width
        if self.encoder_reparameterization_type == "MLP":
            return embedding + (width + 1) * hidden + (hidden + 1) * hidden + (hidden + 1) * width
        inputs = [width] + [2 * hidden] * (self.encoder_num_layers - 1)
        # Two directions of four gates, each with weights for input and state, and two biases.
        lstm = sum(2 * 4 * hidden * (size + hidden + 2) for size in inputs)
        return embedding + lstm + (2 * hidden + 1) * (2 * hidden) + (2 * hidden + 1) * width


@register
class PrefixTuningConfig(PromptLearningConfig):
    """Learned keys and values before every layer's own (Li & Liang 2021, arXiv:2101.00190)."""

    title = "prefix tuning"
    order = 8
    trains = "virtual keys and values"
    gradient_checkpointing = False  # a prefix is a KV cache, which recomputing can't carry
    rate = Rate(
        value=5e-3,
        spread=6.0,
        source="better than 1e-3 in PEFT's comparison; its guide has 3e-2",
    )
    coordinates = (2.3, -0.4)
    aliases = ("prefix", "prefixtuning")

    type: Literal["prefix_tuning"]
    prefix_projection: bool = False
    """Produce the prefix with an MLP while training."""
    encoder_hidden_size: int | None = Field(None, ge=1)
    """Width of that MLP; null takes the model's embedding width."""

    @property
    def row_tokens(self) -> int:
        """The number is 0, as the prefix is in the cache."""
        return 0

    def peft_config(self, max_steps: int, tokenizer_path: str) -> PeftConfig:
        import peft

        return peft.PrefixTuningConfig(
            num_virtual_tokens=self.num_virtual_tokens,
            prefix_projection=self.prefix_projection,
            encoder_hidden_size=self.encoder_hidden_size,  # type: ignore[arg-type]
        )

    def computed(self) -> dict[str, Any]:
        return super().computed() | self._idle(not self.prefix_projection, "encoder_hidden_size")

    @property
    def adapter_is_whole(self) -> bool:
        """The file holds what the MLP put out, where there is one, and not the MLP."""
        return not self.prefix_projection

    def trained_parameters(self, sizes: Sizes) -> int:
        # The width of PEFT's token_dim here: that of one token's keys.
        width, tokens = sizes.num_key_value_heads * sizes.head_dim, self.num_virtual_tokens
        both = 2 * sizes.num_layers * width
        if not self.prefix_projection:
            return tokens * both
        hidden = self.encoder_hidden_size or width
        return tokens * width + (width + 1) * hidden + (hidden + 1) * both


@register
class PromptTuningConfig(PromptLearningConfig):
    """Learned input embeddings (Lester et al. 2021, arXiv:2104.08691)."""

    title = "prompt tuning"
    order = 9
    rate = Rate(
        value=5e-3,
        spread=6.0,
        source="PEFT's comparison has 1e-3, far better than 1e-4; its guide 3e-2: the mean of "
        "their logarithms",
    )
    coordinates = (2.3, 0.4)
    first_weights = ("prompt_tuning_init", "prompt_tuning_init_text")
    aliases = ("prompt", "prompttuning")

    type: Literal["prompt_tuning"]
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "SAMPLE_VOCAB"
    """Start from noise, from embeddings of random words, or from those of a text."""
    prompt_tuning_init_text: str | None = None
    """That text, for prompt_tuning_init: TEXT."""

    def peft_config(self, max_steps: int, tokenizer_path: str) -> PeftConfig:
        import peft

        text = self.prompt_tuning_init == "TEXT"
        return peft.PromptTuningConfig(
            num_virtual_tokens=self.num_virtual_tokens,
            prompt_tuning_init=self.prompt_tuning_init,
            prompt_tuning_init_text=self.prompt_tuning_init_text if text else None,
            tokenizer_name_or_path=tokenizer_path if text else None,
        )

    def refusals(self, max_steps: int) -> Iterator[Incompatibility]:
        if self.prompt_tuning_init == "TEXT" and not self.prompt_tuning_init_text:
            yield Incompatibility(
                "method.prompt_tuning_init=TEXT",
                "no text is given",
                "set method.prompt_tuning_init_text",
            )

    def computed(self) -> dict[str, Any]:
        unread = self.prompt_tuning_init != "TEXT"
        return super().computed() | self._idle(unread, "prompt_tuning_init_text")

    def trained_parameters(self, sizes: Sizes) -> int:
        return self.num_virtual_tokens * sizes.hidden_size
