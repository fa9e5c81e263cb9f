"""A sweep's trials, written to the history by the driver as they happen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import ray.tune
from ray.tune.experiment import Trial

from rayfin.errors import HistoryError
from rayfin.history import History, TrialRecord
from rayfin.tuning.plan import PlannedTrial
from rayfin.tuning.rows import died, started, with_outcome

OnRecord = Callable[[TrialRecord], None]


class Recorder(ray.tune.Callback):
    """One row a trial: written when it starts, at each evaluation, and when it ends.

    Only the driver writes, so that workers on other machines need no way to the database. A row
    that can't be written now (Tune would fail the trial for it) is written with the next one;
    `flush` raises for what is still unwritten at the end.
    """

    def __init__(
        self, history: History, on_record: OnRecord, created: Mapping[str, datetime] | None = None
    ) -> None:
        """`created`: trial id -> when an interrupted trial was started first."""
        self._history, self._on_record = history, on_record
        self._created = created or {}
        self._rows: dict[str, TrialRecord] = {}
        self._unwritten: dict[str, TrialRecord] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles this for a restore that rayfin never makes."""
        return {}

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        if trial.trial_id not in self._rows:  # else it goes on after its process died
            self._put(trial, self._row(trial))

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        self._put(trial, with_outcome(self._row(trial), result["outcome"]))

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        row = self._row(trial)
        if row.status == "running":  # the scheduler ended it, not the trial itself
            self._put(trial, row.updated(status="stopped"))

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        row = self._row(trial)
        if row.status == "running":  # what has ended well stays so, whatever befalls its process
            self._put(trial, died(row, trial.get_pickled_error()))

    @property
    def running(self) -> bool:
        """Whether a trial has started and not ended."""
        return any(row.status == "running" for row in self._rows.values())

    def put(self, row: TrialRecord) -> None:
        """Writes a row now or, where the history can't take it, with a later one."""
        self._unwritten[row.trial_id] = row
        with contextlib.suppress(HistoryError):
            self.flush()
        self._on_record(row)

    def flush(self) -> None:
        """Writes what could not be written before; raises HistoryError where that fails again."""
        for trial_id, row in list(self._unwritten.items()):
            self._history.put(row)
            del self._unwritten[trial_id]

    def _row(self, trial: Trial) -> TrialRecord:
        """The trial's row; a new one too for a worker that died before it could start."""
        if trial.trial_id not in self._rows:
            planned = PlannedTrial.from_tune_config(trial.config)
            self._rows[trial.trial_id] = started(planned, self._created.get(planned.trial_id))
        return self._rows[trial.trial_id]

    def _put(self, trial: Trial, row: TrialRecord) -> None:
        self._rows[trial.trial_id] = row
        self.put(row)
