"""Sizes of a base model, which formulas take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Sizes of a base model; counts are of unquantised weights, tied ones counted once."""

    architecture: str
    parameters: int
    linear_parameters: int
    """Weights of the linear layers but the output head: what 4 and 8 bits apply to."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int | None
    dtype: str
    """Data type in which the weights are stored."""
