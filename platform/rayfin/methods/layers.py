"""The layers of a model that a method adapts, and what it trains there: by formula."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, assert_never

from rayfin.config.method import (
    AdaloraConfig,
    DoraConfig,
    FullConfig,
    Ia3Config,
    LowRankConfig,
    MethodConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
)
from rayfin.models.facts import ModelFacts


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


def block_linears(facts: ModelFacts) -> dict[str, Linear]:
    """The linear layers of one block by the end of their names; Llama's, where none other fits."""
    hidden, wide = facts.hidden_size, facts.intermediate_size
    heads = facts.num_attention_heads * facts.head_dim
    shared = facts.num_key_value_heads * facts.head_dim
    output = Linear("heads", heads, hidden)
    up, down = Linear("mlp", hidden, wide), Linear("wide", wide, hidden)
    for family, names in _FUSED.items():
        if facts.architecture.startswith(family):
            first = Linear("attention", hidden, heads + 2 * shared)
            return dict(zip(names, (first, output, up, down), strict=True))
    key = Linear("attention", hidden, shared)
    attention = {"q_proj": Linear("attention", hidden, heads), "k_proj": key, "v_proj": key}
    if facts.architecture.startswith("OPT"):
        return {**attention, "out_proj": output, "fc1": up, "fc2": down}
    return {**attention, "o_proj": output, "gate_proj": up, "up_proj": up, "down_proj": down}


def targets(method: MethodConfig, facts: ModelFacts) -> Iterator[tuple[str, Linear, float]]:
    """Name, linear layer and number of blocks for all that `method` adapts; none where it has none.

    A name that the table of `block_linears` lacks counts as a square matrix of the hidden width.
    """
    linears, layers = block_linears(facts), float(facts.num_layers)
    names = getattr(method, "target_modules", ())
    if names == "all-linear":
        known = layers * sum(linear.inputs * linear.outputs for linear in linears.values())
        # Of an architecture that the table lacks (experts, say) the weights still tell how many.
        share = facts.linear_parameters / known
        yield from ((name, linear, layers * share) for name, linear in linears.items())
        return
    for name in _ia3_choice(facts) if names is None else names:
        if name.rpartition(".")[2] == "lm_head":
            yield name, Linear("head", facts.hidden_size, facts.vocab_size), 1.0
            continue
        # PEFT compares ends: `q_proj` is every block's, `layers.3.self_attn.q_proj` only one's.
        blocks = 1.0 if any(part.isdigit() for part in name.split(".")) else layers
        ends = [
            linear
            for end, linear in linears.items()
            if end == name or end.endswith(f".{name}") or name.endswith(f".{end}")
        ]
        for linear in ends or [Linear(name, facts.hidden_size, facts.hidden_size)]:
            yield name, linear, blocks


def _ia3_choice(facts: ModelFacts) -> tuple[str, ...]:
    """PEFT's own, by architecture (TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING)."""
    names = tuple(block_linears(facts))
    if "q_proj" not in names:
        return names[0], names[-1]
    if facts.architecture.startswith("OPT"):
        return "q_proj", "k_proj", names[-1]
    key = "k_proj" if facts.architecture.startswith(("LlamaFor", "Mistral")) else "q_proj"
    return key, "v_proj", names[-1]


def trained_parameters(method: MethodConfig, facts: ModelFacts) -> int:
    """How many parameters PEFT attaches and trains; all of the model's for full fine-tuning."""
    match method:
        case FullConfig():
            return facts.parameters
        case LowRankConfig() | AdaloraConfig():
            total = 0.0
            for _, linear, blocks in targets(method, facts):
                total += blocks * rank(method) * (linear.inputs + linear.outputs)
                if isinstance(method, DoraConfig):
                    total += blocks * linear.outputs  # a magnitude for each
                if isinstance(method, AdaloraConfig):
                    total += blocks * method.init_r  # a singular value for each
            return round(total)
        case Ia3Config():
            found = targets(method, facts)
            return round(
                sum(blocks * scaled(method, name, linear) for name, linear, blocks in found)
            )
        case PTuningConfig():
            return _prompt_encoder(method, facts.hidden_size)
        case PrefixTuningConfig():
            # The width of PEFT's token_dim here: that of one token's keys.
            width, tokens = facts.num_key_value_heads * facts.head_dim, method.num_virtual_tokens
            both = 2 * facts.num_layers * width
            if not method.prefix_projection:
                return tokens * both
            hidden = method.encoder_hidden_size or width
            return tokens * width + (width + 1) * hidden + (hidden + 1) * both
        case PromptTuningConfig():
            return method.num_virtual_tokens * facts.hidden_size
        case _:
            assert_never(method)


def rank(method: MethodConfig) -> int:
    """Returns the rank of a method's update matrices as training begins; 0 where it has none."""
    rank: int = getattr(method, "init_r", getattr(method, "r", 0))
    return rank


def scaled(method: Ia3Config, name: str, linear: Linear) -> int:
    """IA3's factors of one layer: its outputs, or the inputs of a feed-forward one."""
    forward = method.feedforward_modules
    inputs = linear.reads == "wide" if forward is None else name in forward
    return linear.inputs if inputs else linear.outputs


def _prompt_encoder(method: PTuningConfig, width: int) -> int:
    """Parameters of PEFT's PromptEncoder: an embedding, then an MLP, or an LSTM and an MLP."""
    embedding = method.num_virtual_tokens * width
    hidden = method.encoder_hidden_size or width
    if method.encoder_reparameterization_type == "MLP":
        return embedding + (width + 1) * hidden + (hidden + 1) * hidden + (hidden + 1) * width
    inputs = [width] + [2 * hidden] * (method.encoder_num_layers - 1)
    # Two directions of four gates, each with weights for input and state, and two biases.
    lstm = sum(2 * 4 * hidden * (size + hidden + 2) for size in inputs)
    return embedding + lstm + (2 * hidden + 1) * (2 * hidden) + (2 * hidden + 1) * width


def virtual_tokens(method: MethodConfig) -> int:
    """Tokens that stand in every row of the batch beside the data's; a prefix is none of them."""
    if isinstance(method, PTuningConfig | PromptTuningConfig):
        return method.num_virtual_tokens
    return 0
