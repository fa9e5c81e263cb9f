"""Read adapters of virtual tokens: P-Tuning, prompt tuning and prefix tuning."""

from __future__ import annotations

from typing import Any

from rayfin.serving.engine.checks import OWN_BASE
from rayfin.serving.engine.layout import MAX_VIRTUAL_TOKENS, BaseLayout
from rayfin.serving.engine.peft_files import COMMON, AdapterSettings, AdapterWeights, shown, words

_PROMPT = COMMON | words(
    "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers",
    "encoder_reparameterization_type encoder_hidden_size encoder_num_layers encoder_dropout",
    "prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs",
    "prefix_projection init_weights",
)
_PROMPT_TENSOR = "prompt_embeddings"


def read_prompt(
    settings: AdapterSettings, weights: AdapterWeights, base: BaseLayout
) -> dict[str, Any]:
    """Read P-Tuning (the encoder's output is what is saved) and prompt tuning."""
    tokens = _virtual_tokens(settings, weights, base)
    settings.expect("token_dim", None, base.hidden_size, remedy=OWN_BASE)
    weights.check({_PROMPT_TENSOR: (tokens, base.hidden_size)})
    return {"prompt": weights.read(_PROMPT_TENSOR)}


def read_prefix(
    settings: AdapterSettings, weights: AdapterWeights, base: BaseLayout
) -> dict[str, Any]:
    """Read prefix tuning; the layout is that of peft.PeftModel.get_prompt: a token's row holds each
    layer's keys, then its values, of all key/value heads.
    """
    tokens = _virtual_tokens(settings, weights, base)
    layers, heads, dim = base.num_layers, base.num_key_value_heads, base.head_dim
    settings.expect("num_layers", layers, remedy=OWN_BASE)
    settings.expect("num_attention_heads", heads, remedy=OWN_BASE)
    settings.expect("token_dim", heads * dim, remedy=OWN_BASE)
    weights.check({_PROMPT_TENSOR: (tokens, layers * 2 * heads * dim)})
    flat = weights.read(_PROMPT_TENSOR)
    return {"prefix": flat.view(tokens, layers, 2, heads, dim).permute(1, 2, 3, 0, 4).contiguous()}


def _virtual_tokens(settings: AdapterSettings, weights: AdapterWeights, base: BaseLayout) -> int:
    settings.expect_nothing_else(_PROMPT)
    settings.expect("num_transformer_submodules", None, 1)
    if extra := weights.names - {_PROMPT_TENSOR}:
        raise settings.error(
            f"the engine does not serve the tensor {shown(min(extra))}; "
            "train again without modules_to_save"
        )
    tokens = settings.integer("num_virtual_tokens", 1, MAX_VIRTUAL_TOKENS)
    if tokens > base.max_virtual_tokens:
        raise settings.error(
            f"it has {tokens} virtual tokens, and there is room for {base.max_virtual_tokens} "
            "before a prompt; raise engine.max_length"
        )
    return tokens
