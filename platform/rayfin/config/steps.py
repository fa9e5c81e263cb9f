"""Lengths of a training in optimizer steps: of epochs, of shares of the whole, and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

Interval = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)]
"""A number of steps or, below 1, a share of all steps."""

_ROUNDING = 1e-9
"""0.1 * 30 is a little more than 3 in floating point, and is meant to be 3."""


def steps_of_epochs(epochs: float, rows: int, samples_per_step: int) -> int:
    """Return the optimizer steps of `epochs` passes over `rows` samples, as Transformers counts.

    The last step of each pass takes the samples that are left: a pass has
    ceil(rows / samples_per_step) steps.
    """
    each = -(-rows // samples_per_step)
    return max(1, math.ceil(epochs * each - _ROUNDING))


def steps_of_share(setting: float, total: int) -> int:
    """Return a number of steps; a `setting` below 1 is a share of `total`, rounded up."""
    if setting >= 1:
        return int(setting)
    return max(1, math.ceil(setting * total - _ROUNDING))


def share_of_steps(steps: float, total: float) -> float:
    """Return the share of `total` that `steps` are, at least as large as one that was asked for."""
    return min(1.0, steps / total + _ROUNDING)


def position(train: Mapping[str, Any], steps: Any) -> str:
    """Return how far a trial is, by its section `train` as the history holds it.

    That is `step 45/60`, or `epoch 1.5/3, step 45/90` where epochs were asked for.
    """
    at = f"step {steps}/{train['max_steps']}"
    return f"epoch {epoch}, {at}" if (epoch := epoch_of(train, steps)) else at


def epoch_of(train: Mapping[str, Any], steps: Any) -> str:
    """Return `1.5/3`, the epoch at a step and those of the trial; nothing for a trial of steps.

    Of one epoch or more, `max_steps` tells the steps of each pass: see `steps_of_epochs`.
    """
    if (epochs := train.get("num_train_epochs")) is None:
        return ""
    total = train["max_steps"]
    each = math.floor(total / epochs + _ROUNDING) if epochs >= 1 else total / epochs
    return f"{min(epochs, steps / each):.3g}/{epochs:g}"


def duration(train: Mapping[str, Any]) -> tuple[str, str]:
    """Return the setting that says how long a trial is, and its value."""
    if (epochs := train.get("num_train_epochs")) is not None:
        return "train.num_train_epochs", f"{epochs:g}"
    return "train.max_steps", str(train.get("max_steps"))
