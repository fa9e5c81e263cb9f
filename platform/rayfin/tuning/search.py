"""Where the next trial comes from: Optuna's ask and tell, behind Ray Tune's Searcher."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from ray.tune.search import Searcher

from rayfin.config import Config
from rayfin.history import TrialRecord
from rayfin.tuning.plan import PlannedTrial, SweepPlan
from rayfin.tuning.space import Values, decode, distributions, encode, size, values_in

log = logging.getLogger(__name__)

# A small discrete space is soon used up: so many draws in a row that were all tried before end it.
_PATIENCE = 50

Recall = Callable[[PlannedTrial], TrialRecord | None]
"""Looks a trial up in the history; a record that it returns is used instead of training again."""


class HistorySearch(Searcher):
    """Suggests trials that were not tried yet, learning from those that were.

    - `known`: this sweep's trials that have ended (after a resume); never suggested again.
    - `first`: points to try before the sampler's own: interrupted trials, an advisor's proposals.
    - `recall`: finished trials of other sweeps, told to the sampler without running them.
    """

    def __init__(
        self,
        plan: SweepPlan,
        *,
        known: Sequence[TrialRecord] = (),
        first: Sequence[Values] = (),
        recall: Recall = lambda _: None,
    ) -> None:
        sweep = plan.config.sweep
        super().__init__(metric=sweep.metric, mode=sweep.direction)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._plan, self._recall = plan, recall
        self._space = distributions(plan.config)
        self._study = optuna.create_study(
            sampler=_sampler(plan.config),
            direction="minimize" if sweep.direction == "min" else "maximize",
        )
        self._asked: dict[str, optuna.Trial] = {}
        self._seen: set[str] = set()
        self._left = sweep.num_samples - len(known)
        for record in known:
            self._learn(record)
        for values in first:
            if (drawn := encode(plan.config, values)) is not None:
                self._study.enqueue_trial(drawn)
        if sweep.search == "grid":
            for values in _grid(plan.config):
                self._study.enqueue_trial(encode(plan.config, values) or {})

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles this for a restore that rayfin never makes."""
        return {}

    def suggest(  # type: ignore[override]  # Searcher.FINISHED is a str
        self, trial_id: str
    ) -> dict[str, Any] | str | None:
        """Tune's next trial configuration, or FINISHED when there is none left."""
        for _ in range(_PATIENCE):
            if self._left <= 0 or self._exhausted():
                break
            asked = self._study.ask(self._space)
            trial = self._plan.trial(decode(self._plan.config, asked.params))
            if trial.fingerprint in self._seen:
                self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
                continue
            self._seen.add(trial.fingerprint)
            self._left -= 1
            if (record := self._recall(trial)) is not None:
                self._tell(asked, record)
                continue
            self._asked[trial_id] = asked
            return trial.as_tune_config()
        return Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """TPE learns from ended trials only."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        asked = self._asked.pop(trial_id, None)
        if asked is None:
            return
        value = (result or {}).get(self._plan.config.sweep.metric)
        if error or value is None:
            # A failed trial has no value; told as such, the sampler neither waits for it nor learns
            # from it.
            self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(asked, float(value))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep is resumed from the history, never from Tune's pickles."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing; see `save`."""

    def _exhausted(self) -> bool:
        return len(self._seen) >= size(self._plan.config)

    def _learn(self, record: TrialRecord) -> None:
        """Adds an ended trial of this sweep to the study."""
        self._seen.add(record.fingerprint)
        drawn = encode(self._plan.config, values_in(self._plan.config, record.spec))
        value = record.metrics.get(self._plan.config.sweep.metric)
        if drawn is None or record.status not in ("finished", "stopped") or value is None:
            return
        self._study.add_trial(
            optuna.trial.create_trial(params=drawn, distributions=self._space, value=float(value))
        )

    def _tell(self, asked: optuna.Trial, record: TrialRecord) -> None:
        self._study.tell(asked, float(record.metrics[self._plan.config.sweep.metric]))


def _sampler(config: Config) -> optuna.samplers.BaseSampler:
    sweep = config.sweep
    if sweep.search in ("random", "grid"):
        return optuna.samplers.RandomSampler(seed=sweep.seed)
    # Optuna's default of 10 random trials would leave TPE nothing to do in a sweep of 8.
    startup = max(3, min(10, sweep.num_samples // 3))
    return optuna.samplers.TPESampler(
        seed=sweep.seed, n_startup_trials=startup, multivariate=True, constant_liar=True
    )


def _grid(config: Config) -> list[Values]:
    axes = config.sweep.parameters
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
