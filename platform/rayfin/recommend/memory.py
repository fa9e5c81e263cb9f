"""The memory that training a configuration takes, in bytes: by formula, before anything loads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple, assert_never

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
from rayfin.config.schema import Config
from rayfin.errors import ConfigError
from rayfin.methods.table import METHODS
from rayfin.models.facts import ModelFacts
from rayfin.training.strategies import share_of_step

Device = Literal["cpu", "cuda"]

_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
_FLOAT32 = 4

_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight: 4 bits, an 8-bit constant for 64 of them, and a float32 for 256 such constants (double
quantisation: arXiv:2305.14314, section 3)."""
_ADAMW_BYTES = 8
"""A trained parameter: two moments in float32, as torch's AdamW keeps them."""

_PROCESS = 500 * 2**20
"""What an interpreter with torch, transformers, peft and bitsandbytes holds on CPU, where the
measured peak is the resident memory of the whole process. Measured: x86-64 Linux, torch 2.13."""

_HEAP = 1.75
_OTHER_HEAP = 1.15
"""Resident / used of a training step on CPU. glibc's heap keeps the holes that freed tensors leave
between those kept for the backward pass; the small products of low-rank adapters (1.75) leave many.
Measured in fresh processes: a worker that goes on to its next trial holds more."""

_CUBLAS = 32 * 2**20
"""cuBLAS' workspace on Hopper, which torch's allocator counts; the CUDA context it does not."""


@dataclass(frozen=True)
class MemoryParts:
    """Bytes at the peak, by what they are for."""

    weights: float
    """The base model's, as they are loaded."""
    adapter: float
    """What a method adds to the base model, in float32; 0 for full fine-tuning."""
    gradients: float
    optimizer: float
    activations: float
    """What a training step, an evaluation or loading holds beside the rest: the most of them."""
    overhead: float
    """The process itself."""

    @property
    def total(self) -> float:
        return float(sum(asdict(self).values()))


def teaching_memory(parameters: float, method: Literal["full", "lora", "qlora"]) -> MemoryParts:
    """The rule of thumb that courses teach, which knows the number of parameters only.

    Weights 2 bytes a parameter, or half a byte in 4 bits; for each trained parameter (1 % of them
    with an adapter) 2 bytes of gradient and 8 of Adam's moments; activations half of the fp16
    weights' bytes (full), a fifth of them (lora), 0.3 bytes a parameter (qlora). Raises ConfigError
    for another method and for a number that can't be one of parameters.
    """
    shares = {"full": 0.5 * 2, "lora": 0.2 * 2, "qlora": 0.3}
    if method not in shares:
        raise ConfigError(f"method='{method}' must be one of {', '.join(shares)}")
    if not 0 < parameters < math.inf:
        raise ConfigError(f"parameters={parameters} must be a positive number; 7e9 is 7 B")
    trained = parameters if method == "full" else 0.01 * parameters
    weights = (0.5 if method == "qlora" else 2) * parameters
    # Neither an adapter nor a process.
    return MemoryParts(weights, 0.0, 2 * trained, 8 * trained, shares[method] * parameters, 0.0)


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
                total += blocks * _rank(method) * (linear.inputs + linear.outputs)
                if isinstance(method, DoraConfig):
                    total += blocks * linear.outputs  # a magnitude for each
                if isinstance(method, AdaloraConfig):
                    total += blocks * method.init_r  # a singular value for each
            return round(total)
        case Ia3Config():
            found = targets(method, facts)
            return round(
                sum(blocks * _scaled(method, name, linear) for name, linear, blocks in found)
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


def _rank(method: MethodConfig) -> int:
    """Of the matrices when training begins; 0 where there are none."""
    rank: int = getattr(method, "init_r", getattr(method, "r", 0))
    return rank


def _scaled(method: Ia3Config, name: str, linear: Linear) -> int:
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


def base_width(config: Config, device: Device) -> int:
    """Bytes of a base weight that is not quantised: as `rayfin.models.load_base` loads them."""
    if isinstance(config.method, FullConfig):
        return _FLOAT32  # `attach` makes what is trained float32
    if config.model.dtype != "auto":
        return _WIDTH[config.model.dtype]
    return _FLOAT32 if device == "cpu" else 2


def virtual_tokens(method: MethodConfig) -> int:
    """Tokens that stand in every row of the batch beside the data's; a prefix is none of them."""
    if isinstance(method, PTuningConfig | PromptTuningConfig):
        return method.num_virtual_tokens
    return 0


def memory_of(
    config: Config,
    facts: ModelFacts,
    *,
    device: Device,
    tokens: int | None = None,
    completion_share: float = 1.0,
) -> MemoryParts:
    """The most memory that a trial of `config` holds at once, on each of its workers.

    As `peak_memory_bytes` is measured: on CPU what the process has resident, on CUDA what torch
    has allocated. `tokens`: of the longest sample (data.max_length where it is not known);
    `completion_share`: tokens with a loss / tokens. Raises ConfigError where they can't be that.
    """
    if tokens is not None and tokens < 1:
        raise ConfigError(f"tokens={tokens} must be 1 or more, or left out")
    if not 0 < completion_share <= 1:
        raise ConfigError(f"completion_share={completion_share} must be above 0 and at most 1")
    trained = trained_parameters(config.method, facts)
    longest = config.data.max_length if tokens is None else min(tokens, config.data.max_length)
    length = longest + virtual_tokens(config.method)
    # DistributedDataParallel gathers gradients in buckets beside them.
    copies = min(config.scaling.num_workers, 2)
    return MemoryParts(
        weights=_weights(config, facts, device),
        adapter=0.0 if isinstance(config.method, FullConfig) else _FLOAT32 * trained,
        gradients=copies * _FLOAT32 * trained,
        optimizer=_ADAMW_BYTES * trained,
        activations=max(
            _training_step(config, facts, device, length, completion_share),
            _evaluation(config, facts, device, length, completion_share),
            # safetensors maps the file: on CPU its pages are resident beside what is made of them.
            _WIDTH.get(facts.dtype, _FLOAT32) * facts.parameters if device == "cpu" else 0.0,
        ),
        overhead=_PROCESS if device == "cpu" else _CUBLAS,
    )


def _weights(config: Config, facts: ModelFacts, device: Device) -> float:
    width, bits = base_width(config, device), config.method.quantization_bit
    if bits is None:
        return width * facts.parameters
    # LLM.int8() has a float32 scale for every row (arXiv:2208.07339).
    each = _NF4_BYTES if bits == 4 else 1 + _FLOAT32 / facts.hidden_size
    return each * facts.linear_parameters + width * (facts.parameters - facts.linear_parameters)


def _block_numbers(config: Config, facts: ModelFacts, device: Device) -> float:
    """Numbers a token that autograd keeps of one block, counted in transformers' Llama.

    Of a frozen block: the input of both norms, the rotated queries, keys and values (repeated for
    every head, as a padding mask asks for), attention's output, and the gated MLP's three factors.
    """
    method, linears = config.method, block_linears(facts)
    gated = any(name.startswith("gate") for name in linears)
    heads = facts.num_attention_heads * facts.head_dim
    numbers = 2.0 * facts.hidden_size + 4 * heads + (3 if gated else 1) * facts.intermediate_size
    if isinstance(method, FullConfig):  # weights that are trained need their inputs, norms too
        return (
            numbers
            + 2 * facts.hidden_size
            + sum({x.reads: x.inputs for x in linears.values() if x.reads != "heads"}.values())
        )
    inputs: dict[str, float] = {}
    for name, linear, blocks in targets(method, facts):
        share = blocks / facts.num_layers
        if isinstance(method, Ia3Config):
            numbers += share * _scaled(method, name, linear)
            continue
        # What several layers read is kept once, unless dropout or autocast copies it for each.
        copied = getattr(method, "lora_dropout", 0) > 0 or device == "cuda"
        if copied or linear.reads != "heads":  # attention's output, which is kept already
            inputs[name if copied else linear.reads] = share * linear.inputs
        products = 2 * linear.outputs if isinstance(method, DoraConfig) else 0
        numbers += share * (_rank(method) + products)  # a magnitude's gradient needs both products
    return numbers + sum(inputs.values())


def _training_step(
    config: Config, facts: ModelFacts, device: Device, length: int, share: float
) -> float:
    """Bytes where the backward pass begins: all that was kept for it, and the logits."""
    width = 2 if device == "cuda" else base_width(config, device)  # CUDA trains under autocast
    rows = length * share_of_step(config.train, config.scaling.num_workers).batch_size
    block = rows * width * _block_numbers(config, facts, device)
    kept = facts.num_layers * block
    if config.train.gradient_checkpointing:  # a block's input each, and one block at a time
        kept = facts.num_layers * rows * width * facts.hidden_size + block
    if isinstance(config.method, FullConfig) and device == "cuda":
        kept += 2 * facts.parameters  # autocast keeps its 16-bit copies for the backward pass
    # float32: the log-probabilities, their gradient and that of the logits; the head runs on the
    # tokens with a loss only (rayfin.training.scoring).
    logits = 3 * _FLOAT32 * rows * share * facts.vocab_size
    used = kept + max(logits, _in_flight(config, facts, rows, width))
    low_rank = METHODS[config.method.type].trains == "low rank"
    return used * ((_HEAP if low_rank else _OTHER_HEAP) if device == "cpu" else 1)


def _evaluation(
    config: Config, facts: ModelFacts, device: Device, length: int, share: float
) -> float:
    """Bytes beside the model while a batch is scored: the logits and their log-probabilities."""
    rows = config.train.per_device_eval_batch_size * length
    logits = 2 * _FLOAT32 * rows * share * facts.vocab_size
    return max(logits, _in_flight(config, facts, rows, base_width(config, device)))


def _in_flight(config: Config, facts: ModelFacts, rows: int, width: int) -> float:
    """A block's tensors at work, and one matrix of a quantised base made whole for a product."""
    tensors = rows * width * (2 * facts.hidden_size + 3 * facts.intermediate_size)
    whole = max(linear.inputs * linear.outputs for linear in block_linears(facts).values())
    return tensors + (width * whole if config.method.quantization_bit else 0)
