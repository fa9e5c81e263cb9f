"""PyTorch's private names: where a schedule of learning rates stands, and oneDNN's products."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from rayfin.compat.private import PrivateName

_name = partial(PrivateName, __name__)

_SCHEDULE = "its own state in load_state_dict, without the functions that a LambdaLR keeps there"
_STEPS_TAKEN = _name(
    "torch.optim.lr_scheduler",
    "LRScheduler._step_count",
    needed_to="set a resumed schedule to its step",
    instead=_SCHEDULE,
    on_instances=True,
)
_LAST_RATES = _name(
    "torch.optim.lr_scheduler",
    "LRScheduler._last_lr",
    needed_to="set a resumed schedule's learning rates",
    instead=_SCHEDULE,
    on_instances=True,
)
_REORDER = _name(
    "torch",
    "ops.mkldnn._reorder_linear_weight",
    needed_to="multiply by an output head twice as fast on CPU",
    instead="a linear layer with prepacked float32 weights in torch",
)
_PRODUCT = _name(
    "torch",
    "ops.mkldnn._linear_pointwise",
    needed_to="multiply by an output head twice as fast on CPU",
    instead="a linear layer with prepacked float32 weights in torch",
)


def set_schedule(scheduler: Any, step: int, rates: list[float]) -> None:
    """Set a schedule to `step`, and the learning rates of its optimizer's groups to `rates`."""
    _STEPS_TAKEN.of(scheduler)
    _LAST_RATES.of(scheduler)
    scheduler.last_epoch = step
    scheduler._step_count = step + 1
    scheduler._last_lr = rates
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def pack_linear_weight(weight: torch.Tensor) -> torch.Tensor:
    """Return float32 weights [out, in] in oneDNN's own order, for `packed_product`."""
    packed: torch.Tensor = _REORDER.get()(weight)
    return packed


def packed_product(
    hidden: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return hidden W^T + bias [tokens, out] for hidden [tokens, in] and packed weights."""
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(hidden, packed, bias, "none", [], "")
    return result
