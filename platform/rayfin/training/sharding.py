"""Formulas for the bytes that each of several workers holds of a trial under each strategy.

ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054, section 5; FSDP: Zhao et al. 2023,
arXiv:2304.11277. Only what adds up to more than a layer is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from rayfin.config import MethodConfig, TrainConfig
from rayfin.config.optimizers import OPTIMIZERS
from rayfin.config.schema import Strategy
from rayfin.models.facts import ModelFacts
from rayfin.training.strategy_files import LARGEST_BUCKET

Device = Literal["cpu", "cuda"]

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2, "bf16-mixed": 4}
"""Bytes of a number by the name of its type; bf16-mixed is loaded as float32."""

SHARDS_WEIGHTS = ("deepspeed-zero3", "fsdp")

_FLOAT32 = 4
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight: 4 bits, an 8-bit constant for 64 of them, and a float32 for 256 such constants (double
quantisation: arXiv:2305.14314, section 3)."""
_8BIT_BYTES = 1 + 4 / 256
"""A number of an 8-bit optimizer, with a float32 scale for every 256 (arXiv:2110.02861)."""
_LEAST_8BIT = 4096
"""Numbers of a tensor from which bitsandbytes keeps its state in 8 bits: its min_8bit_size."""

_LIVE = 1e9
"""Weights that ZeRO-3 keeps gathered at most: DeepSpeed's stage3_max_live_parameters."""


class WorkerBytes(NamedTuple):
    """Bytes on a worker's device while it trains."""

    weights: float
    """The base model's, and what is gathered of the other workers' parts."""
    adapter: float
    gradients: float
    optimizer: float


@dataclass(frozen=True)
class UnshardedBytes:
    """The sizes of a whole trial, before anything is shared."""

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
    state: float = 2 * _FLOAT32
    """Bytes that the optimizer keeps for each number that is trained: AdamW two moments."""

    @classmethod
    def of(
        cls,
        method: MethodConfig,
        facts: ModelFacts,
        strategy: Strategy,
        dtype: str,
        device: Device,
        train: TrainConfig | None = None,
    ) -> UnshardedBytes:
        """`dtype`: model.dtype; `train` has the optimizer, AdamW where it is left out."""
        width, bits = base_width(method, strategy, dtype, device), method.quantization_bit
        # LLM.int8() has a float32 scale for every row (arXiv:2208.07339).
        each = {4: _NF4_BYTES, 8: 1 + _FLOAT32 / facts.hidden_size, None: width}[bits]
        return cls(
            linear=each * facts.linear_parameters,
            rest=width * (facts.parameters - facts.linear_parameters),
            layers=facts.num_layers,
            trained=method.trained_parameters(facts),
            full=method.trains == "weights",
            computed=2 if device == "cuda" else _FLOAT32,
            state=optimizer_bytes(train or TrainConfig(), method, facts),
        )

    @property
    def weights(self) -> float:
        return self.linear + self.rest

    @property
    def bucket(self) -> float:
        """Bytes of gradients on their way to the others; rayfin.training.zero sets their size."""
        return self.computed * min(self.trained, LARGEST_BUCKET)


def optimizer_bytes(train: TrainConfig, method: MethodConfig, facts: ModelFacts) -> float:
    """Return the bytes that the optimizer keeps for each number that is trained.

    A trained tensor counts as a matrix of the method's rank or tokens, and of the model's width.
    """
    known = OPTIMIZERS[train.optim]
    if method.capacity is not None:
        side = int(getattr(method, method.capacity))
    else:
        side = facts.hidden_size if method.trains == "weights" else 1
    if known.moments is None:  # a mean for each row and column: arXiv:1804.04235, section 3
        return _FLOAT32 * (1 / side + 1 / facts.hidden_size)
    arguments = train.optim_args or ""
    numbers = known.moments + ("momentum=" in arguments) + ("centered=" in arguments)
    small = known.bits == 32 or side * facts.hidden_size < _LEAST_8BIT
    return numbers * (_FLOAT32 if small else _8BIT_BYTES)


def base_width(method: MethodConfig, strategy: Strategy, dtype: str, device: Device) -> int:
    """Returns the bytes of a base weight that is not quantised, as `load_base` loads it."""
    if method.trains == "weights" and not strategy.startswith("deepspeed"):
        return _FLOAT32  # `attach` makes what is trained float32
    if dtype != "auto":
        return WIDTH[dtype]
    return _FLOAT32 if device == "cpu" else 2


def frozen_bytes(facts: ModelFacts, dtype: str, device: Device) -> float:
    """Return the bytes of a whole frozen model that is not quantised; `dtype` is model.dtype."""
    width = WIDTH[dtype] if dtype != "auto" else _FLOAT32 if device == "cpu" else 2
    return float(width * facts.parameters)


def _ddp(whole: UnshardedBytes, workers: int, offload: bool) -> WorkerBytes:
    """Returns what DDP holds: several workers gather gradients in buckets beside them."""
    return WorkerBytes(
        whole.weights,
        0.0 if whole.full else _FLOAT32 * whole.trained,
        min(workers, 2) * _FLOAT32 * whole.trained,
        whole.state * whole.trained,
    )


def _fsdp(whole: UnshardedBytes, workers: int, offload: bool) -> WorkerBytes:
    """Returns what FSDP holds: a block at work and the next are gathered, and what is in no block.

    A frozen base is gathered as it lies. What is trained is float32, and gathered as products take
    it; a block's gradients leave for their owners when the next block's are there.
    """
    here = 0 if offload else 1 / workers
    blocks = 2 * whole.linear / whole.layers
    if not whole.full:  # the adapter is whole everywhere, its gradients flat for the message
        return WorkerBytes(
            here * whole.weights + blocks + whole.rest,
            _FLOAT32 * whole.trained,
            2 * _FLOAT32 * whole.trained,
            whole.state * whole.trained,
        )
    gathered = blocks + whole.rest
    return WorkerBytes(
        here * whole.weights + gathered * whole.computed / _FLOAT32,
        0.0,
        here * _FLOAT32 * whole.trained + gathered,
        here * whole.state * whole.trained,
    )


def _zero(stage: int, whole: UnshardedBytes, workers: int, offload: bool) -> WorkerBytes:
    """Returns what ZeRO holds: float32 copies of the optimizer's part beside its state, and
    in a step also of the gradients, which otherwise have the type of the products.
    """
    part = whole.trained / workers
    weights, adapter = whole.weights, 0.0 if whole.full else whole.computed * whole.trained
    gradients = whole.computed * (whole.trained if stage == 1 else part)
    if stage == 3:
        live = min(whole.weights, _LIVE * whole.computed)
        weights = (0.0 if offload else whole.weights / workers) + live
    if offload:
        gradients = gradients if stage == 1 else 0.0
        return WorkerBytes(weights, adapter, gradients + whole.bucket, 0.0)
    gradients += whole.bucket + _FLOAT32 * part
    return WorkerBytes(weights, adapter, gradients, (_FLOAT32 + whole.state) * part)


_HELD: dict[Strategy, Callable[[UnshardedBytes, int, bool], WorkerBytes]] = {
    "auto": _ddp,  # until it is chosen
    "ddp": _ddp,
    "fsdp": _fsdp,
    "deepspeed-zero1": partial(_zero, 1),
    "deepspeed-zero2": partial(_zero, 2),
    "deepspeed-zero3": partial(_zero, 3),
}


def held(
    strategy: Strategy, whole: UnshardedBytes, *, workers: int, offload: bool = False
) -> WorkerBytes:
    """Returns what one of `workers` holds; with `offload`, its own part is in host memory."""
    return _HELD[strategy](whole, workers, offload)
