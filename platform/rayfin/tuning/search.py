"""Where the next trial comes from: Optuna's ask and tell, and what the history knows."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import optuna

from rayfin.config import Config
from rayfin.history import TrialRecord
from rayfin.tuning.plan import PlannedTrial, SweepPlan
from rayfin.tuning.space import Values, decode, distributions, encode, grid, size, values_in

# So many draws in a row that were all tried before: the sampler has nothing new in a small space.
_PATIENCE = 50
# A space of more points than this is not walked through for one that was not tried.
_WALKED = 10_000

Recall = Callable[[PlannedTrial], TrialRecord | None]
"""Looks a trial up in the history; a record that it returns is used instead of training again."""


class HistorySearch:
    """Suggests trials that were not tried yet, learning from those that were.

    - `known`: this sweep's trials that have ended (after a resume); never suggested again.
    - `first`: points to try before the sampler's own: interrupted trials, an advisor's proposals.
    - `recall`: finished trials of other sweeps, told to the sampler without running them.
    """

    done = False
    """Nothing is left to suggest; what was suggested may still run."""

    def __init__(
        self,
        plan: SweepPlan,
        *,
        known: Sequence[TrialRecord] = (),
        first: Sequence[Values] = (),
        recall: Recall = lambda _: None,
    ) -> None:
        sweep = plan.config.sweep
        self.metric, self.direction = sweep.metric, sweep.direction
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._plan, self._recall = plan, recall
        self._space = distributions(plan.config)
        self._study = optuna.create_study(
            sampler=_sampler(plan.config),
            direction="minimize" if sweep.direction == "min" else "maximize",
        )
        self._asked: dict[str, optuna.Trial] = {}
        self._next: tuple[optuna.Trial, PlannedTrial] | None = None
        self._seen: set[str] = set()
        self._left = sweep.num_samples - len(known)
        for record in known:
            self._learn(record)
        for values in first:
            self._enqueue(values)
        if sweep.search == "grid":
            for values in grid(plan.config):
                self._enqueue(values)

    def look_ahead(self) -> bool:
        """Whether there is anything to train; what the history knows before that is recalled."""
        self._next = self._next or self._propose()
        self.done = self._next is None
        return not self.done

    def suggest(self, name: str) -> dict[str, Any] | None:
        """The next trial's configuration, to be told about by `name`; None when none is left."""
        if not self.look_ahead() or self._next is None:
            return None
        self._asked[name], trial = self._next
        self._next = None
        return trial.as_tune_config()

    def tell(self, name: str, value: float | None) -> None:
        """What a suggested trial came to; None for one that failed."""
        asked = self._asked.pop(name, None)
        if asked is None:
            return
        if value is None:
            # A failed trial has no value; told as such, the sampler neither waits for it nor learns
            # from it.
            self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(asked, float(value))

    def _propose(self) -> tuple[optuna.Trial, PlannedTrial] | None:
        """The next trial that must be trained; those that needn't be are recalled on the way."""
        while self._left > 0 and len(self._seen) < size(self._plan.config):
            proposal = self._draw(_PATIENCE) or self._walk()
            if proposal is None:
                break
            asked, trial = proposal
            self._seen.add(trial.fingerprint)
            self._left -= 1
            if (record := self._recall(trial)) is None:
                return proposal
            self._study.tell(asked, float(record.metrics[self.metric]))
        return None

    def _draw(self, times: int) -> tuple[optuna.Trial, PlannedTrial] | None:
        """The sampler's first point of so many that was not tried."""
        for _ in range(times):
            asked = self._study.ask(self._space)
            trial = self._plan.trial(decode(self._plan.config, asked.params))
            if trial.fingerprint not in self._seen:
                return asked, trial
            self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return None

    def _walk(self) -> tuple[optuna.Trial, PlannedTrial] | None:
        """Any point of a small space that was not tried."""
        if size(self._plan.config) > _WALKED:
            return None
        points = list(grid(self._plan.config))
        random.Random(self._plan.config.sweep.seed).shuffle(points)
        for values in points:
            if self._plan.trial(values).fingerprint not in self._seen:
                self._enqueue(values)
                # Points that were enqueued before it, and are known by now, come first.
                return self._draw(_WALKED)
        return None

    def _enqueue(self, values: Values) -> None:
        if (drawn := encode(self._plan.config, values)) is not None:
            self._study.enqueue_trial(drawn)

    def _learn(self, record: TrialRecord) -> None:
        """Adds an ended trial of this sweep to the study."""
        self._seen.add(record.fingerprint)
        drawn = encode(self._plan.config, values_in(self._plan.config, record.spec))
        value = record.metrics.get(self.metric)
        if drawn is None or record.status not in ("finished", "stopped") or value is None:
            return
        self._study.add_trial(
            optuna.trial.create_trial(params=drawn, distributions=self._space, value=float(value))
        )


def _sampler(config: Config) -> optuna.samplers.BaseSampler:
    sweep = config.sweep
    if sweep.search in ("random", "grid"):
        return optuna.samplers.RandomSampler(seed=sweep.seed)
    # Optuna's default of 10 random trials would leave TPE nothing to do in a sweep of 8.
    startup = max(3, min(10, sweep.num_samples // 3))
    return optuna.samplers.TPESampler(
        seed=sweep.seed, n_startup_trials=startup, multivariate=True, constant_liar=True
    )
