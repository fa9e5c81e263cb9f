"""Compute the sizes of a base model from config.json by formula, without torch or transformers.

The formulas follow the modules in transformers.models.*.modeling_*; a test compares them with the
modules themselves. The weights on disk are not used, as packed and fused ones have other shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rayfin.sizes import Sizes


@dataclass(frozen=True)
class _Decoder:
    """A decoder like Llama: embedding, layers of attention and a gated MLP, RMS norms, head."""

    architecture: str
    tied: bool = False
    """Whether embedding and output head are tied where config.json doesn't say."""
    norms: int = 2
    """The number of a layer's norms that are as wide as the hidden state."""
    qk_norm: Literal["head", "all heads"] | None = None
    """The width of the norms of queries and keys, if there are any."""
    qkv_bias: bool = False
    """Whether queries, keys and values always have biases."""
    bias_settings: tuple[str, ...] = ("attention_bias",)
    """The settings that turn on biases, all off by default."""
    all_kv_heads: bool = False
    """Whether num_key_value_heads defaults to the number of attention heads."""
    own_head_dim: bool = False
    """Whether head_dim has a default of its own rather than hidden_size / num_attention_heads."""


_BOTH_BIASES = ("attention_bias", "mlp_bias")
_DECODERS = {
    "gemma": _Decoder("GemmaForCausalLM", tied=True, own_head_dim=True),
    "gemma2": _Decoder("Gemma2ForCausalLM", tied=True, norms=4, own_head_dim=True),
    "gemma3_text": _Decoder(
        "Gemma3ForCausalLM", tied=True, norms=4, qk_norm="head", own_head_dim=True
    ),
    "granite": _Decoder("GraniteForCausalLM", bias_settings=_BOTH_BIASES, all_kv_heads=True),
    "llama": _Decoder("LlamaForCausalLM", bias_settings=_BOTH_BIASES, all_kv_heads=True),
    "mistral": _Decoder("MistralForCausalLM", bias_settings=()),
    "olmo2": _Decoder("Olmo2ForCausalLM", qk_norm="all heads", all_kv_heads=True),
    "phi3": _Decoder("Phi3ForCausalLM", bias_settings=(), all_kv_heads=True),
    "qwen2": _Decoder("Qwen2ForCausalLM", qkv_bias=True, bias_settings=()),
    "qwen3": _Decoder("Qwen3ForCausalLM", qk_norm="head", own_head_dim=True),
    "smollm3": _Decoder("SmolLM3ForCausalLM", tied=True, bias_settings=_BOTH_BIASES),
}
FORMULAS = ("gpt2", *_DECODERS)
"""The values of `model_type` with a formula."""
# A model inside another one, whose settings are elsewhere.
_NESTED = {"decoder", "generator", "text_config", "text_encoder"}
# GPT-2 takes these for its own n_embd, n_head and so on.
_GPT2_ALIASES = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
    *("intermediate_size", "num_key_value_heads", "head_dim"),
}
_DTYPES = ("float32", "float16", "bfloat16")


class _UnknownSize(Exception):
    """config.json leaves a size to the library's default, or has an unusual value."""


def sizes_of(settings: Mapping[str, Any]) -> Sizes | None:
    """Return the sizes by a config.json, or None where only the model itself can tell them."""
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in FORMULAS or _NESTED & settings.keys():
        return None
    try:
        return _gpt2(settings) if kind == "gpt2" else _decoder(_DECODERS[kind], settings)
    except _UnknownSize:
        return None


def _decoder(kind: _Decoder, settings: Mapping[str, Any]) -> Sizes:
    hidden, inner = _size(settings, "hidden_size"), _size(settings, "intermediate_size")
    layers, vocab = _size(settings, "num_hidden_layers"), _size(settings, "vocab_size")
    heads = _size(settings, "num_attention_heads")
    kv_heads = _size(settings, "num_key_value_heads", heads if kind.all_kv_heads else None)
    if hidden % heads or heads % kv_heads:
        raise _UnknownSize
    head_dim = _size(settings, "head_dim", None if kind.own_head_dim else hidden // heads)

    queries, keys = heads * head_dim, kv_heads * head_dim
    linear = hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * inner
    vectors = kind.norms * hidden
    if kind.qk_norm is not None:
        vectors += 2 * head_dim if kind.qk_norm == "head" else queries + keys
    biases = {name: _flag(settings, name, default=False) for name in kind.bias_settings}
    if kind.qkv_bias:
        vectors += queries + 2 * keys
    if biases.get("attention_bias"):
        vectors += queries + 2 * keys + hidden
    if biases.get("mlp_bias"):
        vectors += 2 * inner + hidden
    tied = _flag(settings, "tie_word_embeddings", default=kind.tied)
    return Sizes(
        architecture=_architecture(settings, kind.architecture),
        parameters=layers * (linear + vectors) + hidden + vocab * hidden * (1 if tied else 2),
        linear_parameters=layers * linear,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_position_embeddings=_size(settings, "max_position_embeddings"),
        dtype=_dtype(settings),
    )


def _gpt2(settings: Mapping[str, Any]) -> Sizes:
    hidden, layers = _size(settings, "n_embd"), _size(settings, "n_layer")
    heads, vocab = _size(settings, "n_head"), _size(settings, "vocab_size")
    positions = _size(settings, "n_positions")
    inner = 4 * hidden if settings.get("n_inner") is None else _size(settings, "n_inner")
    if hidden % heads or _GPT2_ALIASES & settings.keys():
        raise _UnknownSize
    if _flag(settings, "add_cross_attention", default=False):
        raise _UnknownSize

    linear = 4 * hidden * hidden + 2 * hidden * inner
    biases = 5 * hidden + inner
    layer_norm = 2 * hidden
    tied = _flag(settings, "tie_word_embeddings", default=True)
    embeddings = hidden * (positions + vocab * (1 if tied else 2))
    return Sizes(
        architecture=_architecture(settings, "GPT2LMHeadModel"),
        parameters=layers * (linear + biases + 2 * layer_norm) + layer_norm + embeddings,
        linear_parameters=layers * linear,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        vocab_size=vocab,
        max_position_embeddings=positions,
        dtype=_dtype(settings),
    )


def _size(settings: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = settings.get(name, default)
    if type(value) is not int or value < 1:
        raise _UnknownSize
    return value


def _flag(settings: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = settings.get(name, default)
    if not isinstance(value, bool):
        raise _UnknownSize
    return value


def _architecture(settings: Mapping[str, Any], expected: str) -> str:
    """Return the architecture that transformers builds for this type; any other is unknown."""
    if settings.get("architectures") not in (None, [], [expected]):
        raise _UnknownSize
    return expected


def _dtype(settings: Mapping[str, Any]) -> str:
    # The second is the older name, which most checkpoints on the hub have.
    names = (settings.get("dtype"), settings.get("torch_dtype"))
    name = next((name for name in names if name is not None), "float32")
    if name not in _DTYPES:
        raise _UnknownSize
    return str(name)
