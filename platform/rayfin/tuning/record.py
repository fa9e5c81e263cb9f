"""A sweep's trials, written to the history by the driver as they happen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray.tune
from ray.tune.experiment import Trial

from rayfin.history import History, TrialRecord
from rayfin.tuning.plan import PlannedTrial
from rayfin.tuning.rows import died, started, with_outcome

OnRecord = Callable[[TrialRecord], None]


class Recorder(ray.tune.Callback):
    """One row a trial: written when it starts, at each evaluation, and when it ends.

    Only the driver writes, so that workers on other machines need no way to the database.
    """

    def __init__(self, history: History, on_record: OnRecord) -> None:
        self._history, self._on_record = history, on_record
        self._rows: dict[str, TrialRecord] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles this for a restore that rayfin never makes."""
        return {}

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        if trial.trial_id not in self._rows:
            planned = PlannedTrial.from_tune_config(trial.config)
            self._put(trial, started(planned, self._history))

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        outcome = result["outcome"]
        self._put(trial, with_outcome(self._rows[trial.trial_id], outcome))

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        row = self._rows[trial.trial_id]
        if row.status == "running":  # the scheduler ended it, not the trial itself
            self._put(trial, row.updated(status="stopped"))

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        row = self._rows[trial.trial_id]
        if row.status == "running":  # what has ended well stays so, whatever befalls its process
            self._put(trial, died(row, trial.get_pickled_error()))

    def _put(self, trial: Trial, row: TrialRecord) -> None:
        self._rows[trial.trial_id] = row
        self._history.put(row)
        self._on_record(row)
