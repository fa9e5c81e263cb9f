"""A sweep's trials, written to the history by the driver as they happen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from datetime import datetime

from rayfin.errors import HistoryError
from rayfin.heartbeat import busy
from rayfin.history import History, TrialRecord
from rayfin.history.driver import interrupted
from rayfin.training.spec import TrialResult
from rayfin.tuning.plan import PlannedTrial
from rayfin.tuning.rows import died, ended, let_checkpoints_go, started, with_result

OnRecord = Callable[[TrialRecord], None]
OnRestart = Callable[[TrialRecord, str], None]
"""Takes the row of a trial that goes on after its process died, and what it died of."""


class Recorder:
    """The writer of a trial's row: when it starts, at each evaluation, and when it ends.

    Only the driver writes, so that workers on other machines need no way to the database. A row
    that can't be written now (Tune would fail the trial for it) is written with the next one;
    `flush` raises for what is still unwritten at the end.
    """

    def __init__(
        self,
        history: History,
        on_record: OnRecord,
        created: Mapping[str, datetime] | None = None,
        on_restart: OnRestart = lambda row, error: None,
    ) -> None:
        """Write to `history`, and hand each row to `on_record`.

        `created` has the times at which interrupted trials were started first, by their ids.
        """
        self._history, self._on_record, self._on_restart = history, on_record, on_restart
        self._created = created or {}
        self._rows: dict[str, TrialRecord] = {}
        self._unwritten: dict[str, TrialRecord] = {}
        self.storage_error: str | None = None
        """What ended the sweep early: its storage can't be written, and no trial could end well."""

    def starts(self, trial: PlannedTrial) -> None:
        if trial.trial_id not in self._rows:  # else it goes on after its process died
            self._put(self._row(trial))

    def reports(self, trial: PlannedTrial, result: TrialResult) -> None:
        """Record how a trial stands, or how it ended."""
        if result.storage_failed:  # its row stays as it is: the trial goes on with a resume
            self.storage_error = result.error
            return
        self._put(with_result(self._row(trial), result))

    def completes(self, trial: PlannedTrial) -> None:
        row = self._row(trial)
        ended_by_itself = row.status != "running" or self.storage_error is not None
        if not ended_by_itself:  # the scheduler ended it
            self._put(ended(row, "stopped"))

    def restarts(self, trial: PlannedTrial, reason: str | None) -> None:
        self.starts(trial)  # its process may have died before it came to that
        row = self._row(trial)
        self._on_restart(row, died(row, reason).error or "")

    def dies(self, trial: PlannedTrial, reason: str | None) -> None:
        row = self._row(trial)
        if row.status == "running":  # what has ended well stays so, whatever befalls its process
            self._put(died(row, reason))

    def interrupt(self) -> bool:
        """Record that the sweep ends here: trials that still run are `interrupted`.

        Returns whether there were any.
        """
        left = [row for row in self._rows.values() if row.status == "running"]
        for row in left:
            self._put(interrupted(row))
        return bool(left)

    def put(self, row: TrialRecord) -> None:
        """Write a row now or, where the history can't take it, with a later one."""
        self._unwritten[row.trial_id] = row
        with contextlib.suppress(HistoryError):
            self.flush()
        with contextlib.suppress(OSError):  # the terminal may be closed
            self._on_record(row)

    def flush(self) -> None:
        """Write what could not be written before; raises HistoryError where that fails again."""
        for trial_id, row in list(self._unwritten.items()):
            with busy(f"recording trial {trial_id} in the history"):
                self._history.put(row)
            del self._unwritten[trial_id]
            if row.status == "finished":  # one that was stopped may be writing, and does it itself
                with busy(f"removing checkpoints of trial {trial_id}"):
                    let_checkpoints_go(row)

    def _row(self, trial: PlannedTrial) -> TrialRecord:
        """Return the trial's row; a new one too for a worker that died before it could start."""
        trial_id = trial.trial_id
        if trial_id not in self._rows:
            self._rows[trial_id] = started(trial, self._created.get(trial_id))
        return self._rows[trial_id]

    def _put(self, row: TrialRecord) -> None:
        self._rows[row.trial_id] = row
        self.put(row)
