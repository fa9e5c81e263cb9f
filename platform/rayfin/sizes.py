"""The sizes of a base model, from which formulas compute memory and time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """The sizes of a base model, unquantised; tied weights are counted once."""

    architecture: str
    parameters: int
    linear_parameters: int
    """The weights of the linear layers without the output head, which quantisation applies to."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int | None
    dtype: str
    """The data type in which the weights are stored."""
