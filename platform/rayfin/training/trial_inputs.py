"""What a trial's trainer is given beside its specification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rayfin.objectives import Objective
from rayfin.samples import TokenizedSample
from rayfin.training.batches import PlannedSamples, StreamedSamples
from rayfin.training.generation import Generate
from rayfin.training.starting_adapter import TrainingState


@dataclass(frozen=True)
class TrialData:
    """What a trial is trained on, and what it is scored on."""

    objective: Objective
    """The one object of the trial, which has its companions."""
    planned: PlannedSamples | StreamedSamples
    held_out: list[TokenizedSample]
    pad_token_id: int
    base_scores: torch.Tensor | None
    """The untrained model's table of scores; None has the workers compute it together."""
    generate: Generate | None = None
    """What answers a few held-out questions at each evaluation, on the first worker."""
    continued: TrainingState | None = None
    """The state of a training that this one continues."""


@dataclass(frozen=True)
class TrialCallbacks:
    """What a trial asks of whoever runs it."""

    evaluated: Callable[[Any], bool | None]
    """Called with the trainer at each evaluation; returns False to stop the trial.

    It must not hold the trainer itself: the model would outlive the trial in a cycle.
    """
    preempted: Callable[[], bool] | None = None
    """Whether this trial's machines are about to be taken away, asked by all workers together every
    few seconds; a checkpoint is saved then, once."""
