"""The linear layers of a model that a method adapts, by formula."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rayfin.methods.module_names import layer_of, may_be_named
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


class Target(NamedTuple):
    """A kind of linear layer that is adapted, and in which blocks it is."""

    name: str
    """The end of its modules' names."""
    linear: Linear
    layers: tuple[int | None, ...]
    """The numbers of its blocks; None where it is in none."""
    share: float = 1.0
    """The linear layers of this kind in each of these blocks."""


def targets(names: str | Iterable[str], sizes: Sizes) -> Iterator[Target]:
    """Yield each kind of linear layer that `names`, or `all-linear`, adapts, a module once.

    A name that the table of `block_linears` lacks counts as a square matrix of the hidden width.
    """
    linears, blocks = block_linears(sizes), range(sizes.num_layers)
    if names == "all-linear":
        known = len(blocks) * sum(linear.inputs * linear.outputs for linear in linears.values())
        # Of an architecture that the table lacks (experts, say) the weights still tell how many.
        share = sizes.linear_parameters / known
        yield from (Target(name, linear, tuple(blocks), share) for name, linear in linears.items())
        return
    names = tuple(dict.fromkeys(names))
    for end, linear in linears.items():
        # PEFT compares ends: `q_proj` is every block's, `layers.3.self_attn.q_proj` only one's.
        if layers := tuple(n for n in blocks if any(may_be_named(end, n, one) for one in names)):
            yield Target(end, linear, layers)
    if any(name.rpartition(".")[2] == "lm_head" for name in names):
        yield Target("lm_head", Linear("head", sizes.hidden_size, sizes.vocab_size), (None,))
    for name in names:
        if name.rpartition(".")[2] != "lm_head" and not names_linear(name, sizes):
            only = layer_of(name)
            square = Linear(name, sizes.hidden_size, sizes.hidden_size)
            yield Target(name, square, tuple(blocks) if only is None else (only,))


def names_linear(name: str, sizes: Sizes) -> bool:
    """Return whether `name` names linear layers of blocks."""
    return any(may_be_named(end, layer_of(name), name) for end in block_linears(sizes))


def whole_modules(names: Iterable[str], sizes: Sizes) -> int:
    """Return the number of weights in all modules that `names` name: linear layers, tables, norms.

    A module that several names name is counted once. Biases are not counted, which are a thousandth
    of them.
    """
    names, found = tuple(names), 0
    for target in targets([name for name in names if names_linear(name, sizes)], sizes):
        found += len(target.layers) * target.linear.inputs * target.linear.outputs
    others: set[tuple[str, int | None]] = set()
    for name in names:
        if not names_linear(name, sizes):
            end, only = name.rpartition(".")[2], layer_of(name)
            once = end in (*_TABLES, *_FINAL_NORMS) or only is not None
            others |= {(end, layer) for layer in ([only] if once else range(sizes.num_layers))}
    for end, _ in others:
        found += sizes.hidden_size * (sizes.vocab_size if end in _TABLES else 1)
    return found
