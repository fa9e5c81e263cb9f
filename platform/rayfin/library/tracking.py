"""Show trackers (`report_to`) what the history gets: trials as runs, and sweeps around them."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from rayfin.library.messages import Say
from rayfin.library.runs import run_of_ended_sweep, run_of_sweep, run_of_trial, system_figures
from rayfin.redaction import redact
from rayfin.trackers import TRACKERS, Run, Sender
from rayfin.tuning.single import RUNS

if TYPE_CHECKING:
    from rayfin.adapters import AdapterVersion
    from rayfin.config import Config
    from rayfin.evaluation.verdict import SweepOutcome
    from rayfin.history import TrialRecord
    from rayfin.paths import Storage, StoragePath

SECONDS = 30.0
"""How long the end of a command waits for its trackers, all together."""


class Tracking:
    """The trackers of one command, and the runs that they are shown.

    The driver alone calls it, with the rows that it writes to the history, so that what trains
    knows nothing of trackers. Nothing but `missing` waits for one.
    """

    def __init__(self, config: Config, storage: Storage, note: Say) -> None:
        """Take `note`, which is told when a tracker is away; raises UsageErrors for unusable ones.

        Their packages must be installed (`check_installed`).
        """
        self._config, self._storage, self._note = config, storage, note
        directory = storage.location.path if storage.location.objects is None else None
        trackers = [TRACKERS[name](directory) for name in config.report_to]
        self.locations = [f"{it.name}: {redact(it.location)}" for it in trackers]
        """Where the runs are to be found, a line for each tracker."""
        self._senders = [Sender(tracker, note) for tracker in trackers]
        self._runs: dict[str, Run] = {}
        self._unpublished: Run | None = None
        """A training that is to be published: it ends with that tag, as no run ends twice."""
        self._system: dict[str, dict[int, dict[str, float]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the senders, where an error or Ctrl-C came before `missing`."""
        for line in self.missing():
            self._note(f"report_to: {line}")

    def record(self, row: TrialRecord) -> None:
        """Show a trial as it stands, or how it ended."""
        if not self._senders:
            return
        system = self._system.setdefault(row.trial_id, {})
        system.update(system_figures(row))
        run = run_of_trial(row, self._config, self._storage, system)
        if (known := self._runs.get(row.trial_id)) is not None:
            run = replace(run, begins=known.begins, tags={**known.tags, **run.tags})
        starts = run.sweep is not None and run.sweep.run_id not in self._runs
        if run.sweep is not None and starts and run.status == "running":
            self._put(run.sweep)
        if run.sweep is None and run.status == "finished" and self._config.publish is not None:
            self._runs[run.run_id] = self._unpublished = run
        else:
            self._put(run)

    def published(self, row: TrialRecord, version: AdapterVersion) -> None:
        """Tag a trial with the version of the registry that it became."""
        if self._senders:
            self.record(row)
            run, self._unpublished = self._runs[row.trial_id], None
            self._put(replace(run, tags={**run.tags, "rayfin.adapter": version.ref}))

    def trained(self, row: TrialRecord, version: AdapterVersion | None) -> None:
        """Show a trial that is no sweep's, or say why not."""
        if not self._senders:
            return
        if row.sweep_id != RUNS:
            self._note(
                f"report_to: nothing is sent, as {row.trial_id} is a trial of another sweep; "
                "--rerun trains it again, and sends that"
            )
            return
        self.record(row)
        if version is not None:
            self.published(row, version)

    def sweep_ended(self, sweep_id: str, outcome: SweepOutcome, report: StoragePath) -> None:
        """Show what a sweep came to, with its report.

        Trials of earlier commands are shown, too: a tracker that was away then may lack them.
        """
        if not self._senders:
            return
        for row in outcome.trials:
            self.record(row)
        run = run_of_sweep(sweep_id, outcome.trials, self._config, self._storage)
        self._put(run_of_ended_sweep(run, outcome, report.path))

    def missing(self, option: str = "") -> list[str]:
        """Have all sent that can be, and return a line for each tracker that lacks something.

        `option` is the one with which the same command sends it, if it needs one.
        """
        remedy = f"the same command{option} sends it"
        if self._unpublished is not None:
            self._put(self._unpublished)
        senders, self._senders = self._senders, []
        for sender in senders:
            sender.ask_to_close()
        until = time.monotonic() + SECONDS
        lines = [sender.join(until - time.monotonic(), remedy) for sender in senders]
        return [line for line in lines if line is not None]

    def _put(self, run: Run) -> None:
        self._runs[run.run_id] = run
        for sender in self._senders:
            sender.put(run)
