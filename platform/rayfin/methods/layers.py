"""The linear layers of a model that a method adapts, by formula."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rayfin.sizes import Sizes


class Linear(NamedTuple):
    """A linear layer of a block; those that read the same tensor have the same `reads`."""

    reads: str
    inputs: int
    outputs: int


# A block's linear layers by name: queries, keys and values, attention's output, the MLP's.
_FUSED = {
    "GPT2": ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"),
    "GPTNeoX": ("query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"),
}

_TABLES = ("lm_head", "embed_out", "embed_tokens", "embed_in", "wte")
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm")
"""Modules that a model has once: output heads and embeddings, and the norm before the head."""


def block_linears(sizes: Sizes) -> dict[str, Linear]:
    """Return the linear layers of one block by the ends of their names: Llama's by default."""
    hidden, wide = sizes.hidden_size, sizes.intermediate_size
    heads = sizes.num_attention_heads * sizes.head_dim
    shared = sizes.num_key_value_heads * sizes.head_dim
    output = Linear("heads", heads, hidden)
    up, down = Linear("mlp", hidden, wide), Linear("wide", wide, hidden)
    for family, names in _FUSED.items():
        if sizes.architecture.startswith(family):
            first = Linear("attention", hidden, heads + 2 * shared)
            return dict(zip(names, (first, output, up, down), strict=True))
    key = Linear("attention", hidden, shared)
    attention = {"q_proj": Linear("attention", hidden, heads), "k_proj": key, "v_proj": key}
    if sizes.architecture.startswith("OPT"):
        return {**attention, "out_proj": output, "fc1": up, "fc2": down}
    return {**attention, "o_proj": output, "gate_proj": up, "up_proj": up, "down_proj": down}


def targets(names: str | Iterable[str], sizes: Sizes) -> Iterator[tuple[str, Linear, float]]:
    """Yield name, linear layer and number of blocks for all that `names`, or `all-linear`, adapts.

    A name that the table of `block_linears` lacks counts as a square matrix of the hidden width.
    """
    linears, layers = block_linears(sizes), float(sizes.num_layers)
    if names == "all-linear":
        known = layers * sum(linear.inputs * linear.outputs for linear in linears.values())
        # Of an architecture that the table lacks (experts, say) the weights still tell how many.
        share = sizes.linear_parameters / known
        yield from ((name, linear, layers * share) for name, linear in linears.items())
        return
    for name in names:
        if name.rpartition(".")[2] == "lm_head":
            yield name, Linear("head", sizes.hidden_size, sizes.vocab_size), 1.0
            continue
        # PEFT compares ends: `q_proj` is every block's, `layers.3.self_attn.q_proj` only one's.
        blocks = 1.0 if any(part.isdigit() for part in name.split(".")) else layers
        ends = [
            linear
            for end, linear in linears.items()
            if end == name or end.endswith(f".{name}") or name.endswith(f".{end}")
        ]
        for linear in ends or [Linear(name, sizes.hidden_size, sizes.hidden_size)]:
            yield name, linear, blocks


def whole_module(name: str, sizes: Sizes) -> float:
    """Return the number of weights in all modules that `name` names: linear layers, tables, norms.

    Biases are not counted, which are a thousandth of them.
    """
    end = name.rpartition(".")[2]
    if end in _TABLES:
        return sizes.vocab_size * sizes.hidden_size
    if any(end == linear.rpartition(".")[2] for linear in block_linears(sizes)):
        return sum(n * it.inputs * it.outputs for _, it, n in targets((name,), sizes))
    once = end in _FINAL_NORMS or any(part.isdigit() for part in name.split("."))
    return sizes.hidden_size * (1 if once else sizes.num_layers)
