"""The seconds of a training step by formula: its FLOPs at the usual speed of a device."""

from __future__ import annotations

from rayfin.config.schema import Config
from rayfin.models.facts import ModelFacts
from rayfin.training.sharding import Device
from rayfin.training.strategies import share_of_step

_PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 150e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "T4": 65e12,
}
"""Dense 16-bit tensor FLOP/s by a part of a GPU's name (NVIDIA's data sheets); the first match."""
DESCRIBED_GPU = "a GPU"
"""The name of a GPU that is not here, and of which only the memory is told."""
_USUAL_GPU = ((80, "A100"), (40, "A40"), (24, "L4"), (0, "T4"))
"""The GPU that one of at least so many GiB is as fast as, where only its memory is told: the slower
ones of those that are rented, as a budget that is kept is worth more than one that is not."""
_SUSTAINED = 0.3
"""The share of the peak that training reaches; well-tuned runs reach 0.3 to 0.5
(arXiv:2204.02311, 4.1)."""
_CORE_FLOPS = 25e9
"""The float32 FLOP/s of a CPU core: half of what an AVX2 core's matrix products reach."""
_BLOCK_SECONDS = {"cpu": 1e-2, "cuda": 2e-3}
"""The least seconds of a block, forward and backward, for Python and kernel launches."""


def step_seconds(
    config: Config,
    facts: ModelFacts,
    *,
    device: Device,
    device_name: str,
    cpu_count: int,
    tokens: float,
    completion_share: float,
) -> float:
    """Return the seconds of an optimizer step over samples of `tokens` tokens each.

    `completion_share` is the share of tokens with a loss.
    """
    length = tokens + config.method.row_tokens
    share = share_of_step(config.train, config.scaling.num_workers)
    flops = share.batch_size * length
    flops *= flops_per_token(config, facts, length, completion_share)
    if device == "cpu":  # whose cores the workers share
        speed = _CORE_FLOPS * cpu_count / config.scaling.num_workers
    else:
        known = (peak for part, peak in _PEAK_FLOPS.items() if part in device_name)
        speed = _SUSTAINED * next(known, 60e12)  # a guess at any other
    launches = _BLOCK_SECONDS[device] * facts.num_layers
    return share.accumulation * (flops / speed + launches)


def usual_gpu(memory: float) -> str:
    """Return the name of a GPU that stands for one with so many bytes, of which no more is told."""
    return next(name for least, name in _USUAL_GPU if memory >= least * 2**30)


def flops_per_token(
    config: Config, facts: ModelFacts, length: float, completion_share: float = 1.0
) -> float:
    """Return the FLOPs of a training step for one token in a row of `length` tokens.

    A product takes 2 per weight forward, 2 backward to its inputs, and 2 to its weights if these
    are trained: 6 per parameter for full fine-tuning, 4 for adapters (Kaplan et al. 2020,
    arXiv:2001.08361, section 2.1). Attention adds two products with the row; the head runs only on
    tokens with a loss; recomputed activations take one more forward pass.
    """
    head = completion_share * facts.vocab_size * facts.hidden_size
    attention = 2 * length * facts.num_attention_heads * facts.head_dim * facts.num_layers
    forward = 2 * (facts.linear_parameters + head + attention)
    full = config.method.trains == "weights"
    passes = (3 if full else 2) + config.train.gradient_checkpointing
    return passes * forward + config.method.flops_per_token(facts)
