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
    "A10": 125e12,
    "L4": 121e12,
    "T4": 65e12,
}
"""Dense 16-bit tensor FLOP/s by a part of a GPU's name (NVIDIA's data sheets); the first match."""
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
