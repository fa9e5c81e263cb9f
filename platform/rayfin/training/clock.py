"""How long the steps of a trial took."""

from __future__ import annotations

import time


class Clock:
    """Time in the training loop, without evaluations, reports and checkpoints."""

    def __init__(self) -> None:
        self.before = 0.0  # of the processes that this trial was resumed from
        self.first_step = 0
        self.seconds = 0.0
        self._started: float | None = None

    @property
    def elapsed(self) -> float:
        """Seconds in this process so far, also while it runs."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self.seconds + running

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self._started = None
