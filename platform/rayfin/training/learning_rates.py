"""Learning rates of an optimizer's groups, where a method's parameters have several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rayfin.compat.torch import set_schedule
from rayfin.training.checkpoint import TrainingProgress
from rayfin.training.parallel import trained


def divide_groups(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, factor: Callable[[str], float]
) -> None:
    """Multiplies learning rates by `factor` of a parameter's name, in groups of parameters of one.

    An optimizer whose factors are all 1 stays as it is.
    """
    factors = {parameter: factor(name) for name, parameter in trained(model)}
    different = dict.fromkeys(factors.values())
    if list(different) == [1.0]:
        return
    parts = []
    for group in optimizer.param_groups:
        for one in different:
            if own := [p for p in group["params"] if factors[p] == one]:
                parts.append(group | {"params": own, "lr": group["lr"] * one})
    optimizer.param_groups = parts


def resume_schedule(scheduler: Any, progress: TrainingProgress) -> None:
    """Set where learning rates stand: by the steps alone, or as a schedule says of itself."""
    if progress.schedule is not None:
        scheduler.load_state_dict(progress.schedule)
        for group, rate in zip(
            scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True
        ):
            group["lr"] = rate
        return
    groups = scheduler.optimizer.param_groups
    first = groups[0]["initial_lr"]
    rates = [
        progress.learning_rate
        if group["initial_lr"] == first
        else group["initial_lr"] * scheduler.lr_lambdas[number](progress.schedule_steps)
        for number, group in enumerate(groups)
    ]
    set_schedule(scheduler, progress.schedule_steps, rates)
