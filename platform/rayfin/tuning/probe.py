"""Trains the first steps of trials, one after another in this process, on one loaded base model."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rayfin.config import Config, DataConfig, with_values
from rayfin.data import Corpus
from rayfin.errors import ConfigError, HistoryError
from rayfin.hardware import describe_hardware
from rayfin.history import History, TrialRecord
from rayfin.history.driver import interrupted, mark_lost_trials
from rayfin.paths import Storage
from rayfin.statuses import ENDED
from rayfin.training.combination import check_combination
from rayfin.training.precision import with_precision
from rayfin.training.spec import TrialResult
from rayfin.training.strategies import needs_group
from rayfin.tuning.driver_lock import driver_lock
from rayfin.tuning.plan import PlannedTrial, SweepPlan
from rayfin.tuning.preflight import check_run
from rayfin.tuning.rows import let_checkpoints_go, started, with_result

if TYPE_CHECKING:
    from rayfin.training.trial_cache import TrialCache

PROBES = "probe"
"""The sweep that all probes belong to; their rows have `probe` in their scenario."""
_LOOKS = 2
"""Evaluations of a probe, the last at its end: a curve is described by two points and more."""


@dataclass(frozen=True)
class ProbedTrial:
    """A probe's row, and what it cost."""

    row: TrialRecord
    recalled: bool
    """Whether the history had it: nothing was trained for it now."""
    seconds: float
    """What it took now, loading and scoring included."""


@dataclass
class Prober:
    """Trains probes of variants of one configuration.

    A probe that the history has, of the same computation and at least as long, is returned as it
    is; one that was interrupted goes on from its checkpoint.
    """

    history: History
    storage: Storage
    corpora: dict[DataConfig, Corpus] = field(default_factory=dict)
    _cache: TrialCache | None = None

    def probe(self, config: Config, steps: int) -> ProbedTrial:
        """Train the first `steps` steps of a configuration's trial, at least 2.

        The row is `stopped` with the curve until there, or `failed`. Raises UsageErrors for what
        can't be trained here.
        """
        begun = time.monotonic()
        config = _looked_at(_here(config), steps)
        plan = SweepPlan(PROBES, config, self.storage, self.corpora)
        check_run(plan, [config], None)
        trial = plan.trial({})
        mark_lost_trials(self.history)
        otherwise = "wait for its end"
        with driver_lock(trial.location, trial.trial_id, otherwise):
            before = self._row(trial)
            if before is not None and _is_done(before, steps):
                return ProbedTrial(before, recalled=True, seconds=time.monotonic() - begun)
            begun_at = None if before is None else before.created_at
            row = self._train(plan, trial, started(trial, begun_at), steps)
        return ProbedTrial(row, recalled=False, seconds=time.monotonic() - begun)

    def _row(self, trial: PlannedTrial) -> TrialRecord | None:
        found = self.history.trials(sweep_id=PROBES, fingerprint=trial.fingerprint)
        return found[0] if found else None

    def _train(
        self, plan: SweepPlan, trial: PlannedTrial, row: TrialRecord, steps: int
    ) -> TrialRecord:
        from rayfin.training.trial import run_trial
        from rayfin.training.trial_cache import TrialCache

        self._cache = self._cache or TrialCache(plan.corpora)

        def record(result: TrialResult) -> None:
            nonlocal row
            row = with_result(row, result)
            row = row.updated(scenario=row.scenario | {"probe": steps})
            self.history.put(row)

        def report(result: TrialResult) -> bool:
            record(result)
            return int(result.metrics["steps"]) < steps

        self.history.put(row)
        try:
            record(
                run_trial(
                    trial.spec,
                    report,
                    location=trial.location,
                    hardware=describe_hardware(plan.config.scaling.use_gpu),
                    warm=self._cache,
                )
            )
        except BaseException:  # also Ctrl-C: the same command goes on
            with contextlib.suppress(HistoryError):
                self.history.change(trial.trial_id, _interrupted)
            raise
        let_checkpoints_go(row)
        return row


def _interrupted(row: TrialRecord) -> TrialRecord | None:
    return interrupted(row) if row.status == "running" else None


def _is_done(row: TrialRecord, steps: int) -> bool:
    return row.status in ENDED and (
        row.status == "failed" or int(row.metrics.get("steps", 0)) >= steps
    )


def _here(config: Config) -> Config:
    """Return the configuration as this process trains it; raises ConfigError where it can't."""
    if needs_group(config.scaling):
        raise ConfigError(
            f"scaling.num_workers={config.scaling.num_workers}: probes train in one process; use "
            "scaling.num_workers=1, or a sweep of train.learning_rate"
        )
    if config.data.streaming:
        raise ConfigError(
            "data.streaming=true: probes read their data whole; use data.max_samples with "
            "data.streaming=false, or a sweep of train.learning_rate"
        )
    check_combination(config)
    return with_precision(config)


def _looked_at(config: Config, steps: int) -> Config:
    """Return the configuration with its evaluations at such steps that one is at the end."""
    every = max(1, steps // _LOOKS)
    return with_values(config, {"train.eval_steps": every, "train.save_steps": every})


def probe_steps(total: int, share: float) -> int:
    """Return the steps of a probe of a trial of `total` steps: a multiple of its evaluations."""
    return min(total, _LOOKS * max(1, round(share * total / _LOOKS)))
