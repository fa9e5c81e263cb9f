"""What each of several workers holds of a trial under each strategy, in bytes: by formula.

ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054, section 5; FSDP: Zhao et al. 2023,
arXiv:2304.11277. Only what adds up to more than a layer is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from rayfin.config.schema import Strategy
from rayfin.training.strategy_files import LARGEST_BUCKET

_FLOAT32 = 4
_ADAMW_BYTES = 8
"""A trained parameter: two moments in float32, as torch's AdamW keeps them."""

_LIVE = 1e9
"""Weights that ZeRO-3 keeps gathered at most: DeepSpeed's stage3_max_live_parameters."""


class Held(NamedTuple):
    """Bytes on a worker's device while it trains."""

    weights: float
    """The base model's, and what is gathered of the other workers' parts."""
    adapter: float
    gradients: float
    optimizer: float


@dataclass(frozen=True)
class Whole:
    """A trial's numbers, before anything is shared."""

    linear: float
    """Bytes of the blocks' linear weights as they are loaded, quantised or not."""
    rest: float
    """Bytes of all other weights: embeddings, head, norms."""
    layers: int
    trained: float
    """Numbers that are trained."""
    full: bool
    """Whether these are the model's own."""
    computed: int
    """Bytes of a number that products take: 2 where there is mixed precision."""

    @property
    def weights(self) -> float:
        return self.linear + self.rest

    @property
    def bucket(self) -> float:
        """Bytes of gradients on their way to the others; rayfin.training.zero sets their size."""
        return self.computed * min(self.trained, LARGEST_BUCKET)


def _ddp(whole: Whole, workers: int, offload: bool) -> Held:
    """Gradients are gathered in buckets beside them, where there is somebody to average with."""
    return Held(
        whole.weights,
        0.0 if whole.full else _FLOAT32 * whole.trained,
        min(workers, 2) * _FLOAT32 * whole.trained,
        _ADAMW_BYTES * whole.trained,
    )


def _fsdp(whole: Whole, workers: int, offload: bool) -> Held:
    """A block at work and the next are gathered, and all that is in no block from first to last.

    A frozen base is gathered as it lies. What is trained is float32, and gathered as products take
    it; a block's gradients leave for their owners when the next block's are there.
    """
    here = 0 if offload else 1 / workers
    blocks = 2 * whole.linear / whole.layers
    if not whole.full:  # the adapter is whole everywhere, its gradients flat for the message
        return Held(
            here * whole.weights + blocks + whole.rest,
            _FLOAT32 * whole.trained,
            2 * _FLOAT32 * whole.trained,
            _ADAMW_BYTES * whole.trained,
        )
    gathered = blocks + whole.rest
    return Held(
        here * whole.weights + gathered * whole.computed / _FLOAT32,
        0.0,
        here * _FLOAT32 * whole.trained + gathered,
        here * _ADAMW_BYTES * whole.trained,
    )


def _zero(stage: int) -> Callable[[Whole, int, bool], Held]:
    def held(whole: Whole, workers: int, offload: bool) -> Held:
        """The optimizer has float32 copies of its part beside AdamW's moments, for a step also of
        the gradients, which else are as products take them.
        """
        part = whole.trained / workers
        weights, adapter = whole.weights, 0.0 if whole.full else whole.computed * whole.trained
        gradients = whole.computed * (whole.trained if stage == 1 else part)
        if stage == 3:
            live = min(1.0, _LIVE * whole.computed / whole.weights) * whole.weights
            weights = (0.0 if offload else whole.weights / workers) + live
        if offload:
            gradients = gradients if stage == 1 else 0.0
            return Held(weights, adapter, gradients + whole.bucket, 0.0)
        gradients += whole.bucket + _FLOAT32 * part
        return Held(weights, adapter, gradients, (_FLOAT32 + _ADAMW_BYTES) * part)

    return held


_HELD: dict[Strategy, Callable[[Whole, int, bool], Held]] = {
    "auto": _ddp,  # until it is chosen
    "ddp": _ddp,
    "fsdp": _fsdp,
    "deepspeed-zero1": _zero(1),
    "deepspeed-zero2": _zero(2),
    "deepspeed-zero3": _zero(3),
}


def held(strategy: Strategy, whole: Whole, *, workers: int, offload: bool) -> Held:
    """What one of `workers` holds; `offload`: whether its own part is in host memory instead."""
    return _HELD[strategy](whole, workers, offload)
