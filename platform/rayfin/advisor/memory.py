"""The memory that training a configuration takes, in bytes, by formula before anything loads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from rayfin.config.schema import Config
from rayfin.errors import ConfigError
from rayfin.methods.layers import block_linears
from rayfin.models.facts import ModelFacts
from rayfin.training.sharding import (
    SHARDS_WEIGHTS,
    WIDTH,
    Device,
    UnshardedBytes,
    base_width,
    frozen_bytes,
    held,
)
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
    """The bytes at the peak, by their use."""

    weights: float
    """The base model's weights as they are loaded, and those of the objective's companions."""
    adapter: float
    """What a method adds to the base model, in float32; 0 for full fine-tuning."""
    gradients: float
    optimizer: float
    activations: float
    """What a training step, an evaluation or loading holds beside the rest: the most of them."""
    overhead: float
    """What the process itself holds."""

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return float(sum(asdict(self).values()))


def teaching_memory(parameters: float, method: Literal["full", "lora", "qlora"]) -> MemoryParts:
    """Return the bytes by the rule of thumb that courses teach, from the number of parameters only.

    Weights take 2 bytes per parameter, or half a byte in 4 bits; each trained parameter (1 % of all
    with an adapter) takes 2 bytes of gradient and 8 of Adam's moments; activations take half of the
    fp16 weights' bytes (full), a fifth of them (lora), or 0.3 bytes per parameter (qlora). Raises
    ConfigError for another method and for an impossible number of parameters.
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
    companions: Sequence[ModelFacts] = (),
) -> MemoryParts:
    """Return the most memory that a trial of `config` holds at once, on each of its workers.

    It is what `peak_memory_bytes` measures: on CPU the resident memory of the process, on CUDA what
    torch has allocated. `tokens` are those of the longest sample (data.max_length by default), and
    `completion_share` is the share of tokens with a loss. `companions` are the objective's,
    which every worker holds whole. scaling.strategy=auto counts as ddp; `estimate` knows which one
    is chosen. Raises ConfigError for impossible numbers.
    """
    if tokens is not None and tokens < 1:
        raise ConfigError(f"tokens={tokens} must be 1 or more, or left out")
    if not 0 < completion_share <= 1:
        raise ConfigError(f"completion_share={completion_share} must be above 0 and at most 1")
    scaling = config.scaling
    longest = config.data.max_length if tokens is None else min(tokens, config.data.max_length)
    length = longest + config.method.row_tokens
    whole = UnshardedBytes.of(
        config.method, facts, scaling.strategy, config.model.dtype, device, config.train
    )
    share = held(scaling.strategy, whole, workers=scaling.num_workers, offload=scaling.cpu_offload)
    if device == "cpu" and scaling.strategy in SHARDS_WEIGHTS:
        # A worker cuts its part from a whole base, whose memory the process keeps.
        share = share._replace(weights=share.weights + whole.weights)
    beside = sum(frozen_bytes(one, config.model.dtype, device) for one in companions)
    share = share._replace(weights=share.weights + beside)
    if device == "cpu":  # where the host's memory is the device's
        kept = _FLOAT32 * config.method.host_parameters(facts)
        share = share._replace(adapter=share.adapter + kept)
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
    """Return how many numbers per token autograd keeps of one block, counted in transformers'
    Llama.

    Of a frozen block it keeps the input of both norms, the rotated queries, keys and values
    (repeated for every head, as a padding mask requires), attention's output, and the gated MLP's
    three factors.
    """
    gated = any(name.startswith("gate") for name in block_linears(facts))
    heads = facts.num_attention_heads * facts.head_dim
    numbers = 2.0 * facts.hidden_size + 4 * heads + (3 if gated else 1) * facts.intermediate_size
    return numbers + config.method.kept_activations(facts, mixed_precision=device == "cuda")


def _training_step(
    config: Config, facts: ModelFacts, device: Device, length: int, share: float
) -> float:
    """Return the bytes at the start of the backward pass: all that it needs, and the logits."""
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
    # tokens with a loss only (rayfin.objectives.sft).
    logits = 3 * _FLOAT32 * rows * share * facts.vocab_size
    used = kept + max(logits, _in_flight(config, facts, rows, width))
    heap = _HEAP if config.method.fragments_heap else _OTHER_HEAP
    return used * (heap if device == "cpu" else 1)


def _evaluation(
    config: Config, facts: ModelFacts, device: Device, length: int, share: float
) -> float:
    """Return the bytes besides the model while a batch is scored: logits and log-probabilities."""
    rows = config.train.per_device_eval_batch_size * length
    logits = 2 * _FLOAT32 * rows * share * facts.vocab_size
    return max(logits, _in_flight(config, facts, rows, _width(config, device)))


def _in_flight(config: Config, facts: ModelFacts, rows: int, width: int) -> float:
    """Return the bytes of a block's temporary tensors, and of one dequantised matrix, if any."""
    tensors = rows * width * (2 * facts.hidden_size + 3 * facts.intermediate_size)
    whole = max(linear.inputs * linear.outputs for linear in block_linears(facts).values())
    return tensors + (width * whole if config.method.quantization_bit else 0)
