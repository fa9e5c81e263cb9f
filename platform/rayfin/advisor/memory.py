"""The memory that training a configuration takes, in bytes: by formula, before anything loads."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

from rayfin.config.schema import Config
from rayfin.errors import ConfigError
from rayfin.methods.layers import block_linears
from rayfin.models.facts import ModelFacts
from rayfin.training.sharding import SHARDS_WEIGHTS, WIDTH, Device, Whole, base_width, held
from rayfin.training.strategies import share_of_step

_FLOAT32 = 4

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
    `completion_share`: tokens with a loss / tokens. scaling.strategy=auto counts as ddp: `estimate`
    knows what is chosen. Raises ConfigError where the numbers can't be that.
    """
    if tokens is not None and tokens < 1:
        raise ConfigError(f"tokens={tokens} must be 1 or more, or left out")
    if not 0 < completion_share <= 1:
        raise ConfigError(f"completion_share={completion_share} must be above 0 and at most 1")
    scaling = config.scaling
    longest = config.data.max_length if tokens is None else min(tokens, config.data.max_length)
    length = longest + config.method.row_tokens
    whole = Whole.of(config.method, facts, scaling.strategy, config.model.dtype, device)
    share = held(scaling.strategy, whole, workers=scaling.num_workers, offload=scaling.cpu_offload)
    if device == "cpu" and scaling.strategy in SHARDS_WEIGHTS:
        # Its part of a base it takes from the whole, whose memory the process keeps.
        share = share._replace(weights=share.weights + whole.weights)
    return MemoryParts(
        *share,
        activations=max(
            _training_step(config, facts, device, length, completion_share),
            _evaluation(config, facts, device, length, completion_share),
            # safetensors maps the file: on CPU its pages are resident beside what is made of them.
            WIDTH.get(facts.dtype, _FLOAT32) * facts.parameters if device == "cpu" else 0.0,
        ),
        overhead=_PROCESS if device == "cpu" else _CUBLAS,
    )


def _width(config: Config, device: Device) -> int:
    return base_width(config.method, config.scaling.strategy, config.model.dtype, device)


def _block_numbers(config: Config, facts: ModelFacts, device: Device) -> float:
    """Numbers a token that autograd keeps of one block, counted in transformers' Llama.

    Of a frozen block: the input of both norms, the rotated queries, keys and values (repeated for
    every head, as a padding mask asks for), attention's output, and the gated MLP's three factors.
    """
    gated = any(name.startswith("gate") for name in block_linears(facts))
    heads = facts.num_attention_heads * facts.head_dim
    numbers = 2.0 * facts.hidden_size + 4 * heads + (3 if gated else 1) * facts.intermediate_size
    return numbers + config.method.kept_activations(facts, mixed_precision=device == "cuda")


def _training_step(
    config: Config, facts: ModelFacts, device: Device, length: int, share: float
) -> float:
    """Bytes where the backward pass begins: all that was kept for it, and the logits."""
    width = 2 if device == "cuda" else _width(config, device)  # CUDA trains under autocast
    rows = length * share_of_step(config.train, config.scaling.num_workers).batch_size
    block = rows * width * _block_numbers(config, facts, device)
    block += _FLOAT32 * config.method.kept_weights(facts)
    kept = facts.num_layers * block
    if config.train.gradient_checkpointing:  # a block's input each, and one block at a time
        kept = facts.num_layers * rows * width * facts.hidden_size + block
    float32 = config.method.trains == "weights" and config.scaling.strategy in ("auto", "ddp")
    if float32 and device == "cuda":
        kept += 2 * facts.parameters  # autocast keeps its 16-bit copies for the backward pass
    # float32: the log-probabilities, their gradient and that of the logits; the head runs on the
    # tokens with a loss only (rayfin.training.scoring).
    logits = 3 * _FLOAT32 * rows * share * facts.vocab_size
    used = kept + max(logits, _in_flight(config, facts, rows, width))
    low_rank = config.method.trains == "low rank"
    return used * ((_HEAP if low_rank else _OTHER_HEAP) if device == "cpu" else 1)


def _evaluation(
    config: Config, facts: ModelFacts, device: Device, length: int, share: float
) -> float:
    """Bytes beside the model while a batch is scored: the logits and their log-probabilities."""
    rows = config.train.per_device_eval_batch_size * length
    logits = 2 * _FLOAT32 * rows * share * facts.vocab_size
    return max(logits, _in_flight(config, facts, rows, _width(config, device)))


def _in_flight(config: Config, facts: ModelFacts, rows: int, width: int) -> float:
    """A block's tensors at work, and one matrix of a quantised base made whole for a product."""
    tensors = rows * width * (2 * facts.hidden_size + 3 * facts.intermediate_size)
    whole = max(linear.inputs * linear.outputs for linear in block_linears(facts).values())
    return tensors + (width * whole if config.method.quantization_bit else 0)
