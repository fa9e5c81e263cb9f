"""When to save a trial because its machines are about to be taken away."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from rayfin.training.clock import Clock

if TYPE_CHECKING:
    from accelerate import Accelerator

# A question is a barrier for all workers: a few steps tell how many there may be between two.
_STEPS_TO_TIME = 3
_SECONDS_BETWEEN_QUESTIONS = 5.0


class PreemptionWatch:
    """Asks every few seconds whether the machines are about to be taken away, until they are.

    All workers ask at the same steps, and get the same answer.
    """

    def __init__(self, preempted: Callable[[], bool] | None) -> None:
        self._preempted = preempted
        self._asks_every = 1  # steps

    def save_now(self, accelerator: Accelerator, steps: int, clock: Clock) -> bool:
        """Return whether to save a checkpoint now; `steps` were made since the clock started."""
        if self._preempted is None or steps % self._asks_every:
            return False
        if steps == _STEPS_TO_TIME:
            own = torch.tensor(clock.elapsed / steps, device=accelerator.device)
            seconds = float(accelerator.reduce(own, "mean"))
            self._asks_every = max(1, round(_SECONDS_BETWEEN_QUESTIONS / max(seconds, 1e-6)))
        if not self._preempted():
            return False
        self._preempted = None
        return True
