"""Early stopping of trials that almost surely end worse than the best one, by their curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from rayfin.history import History
from rayfin.metrics import score_of
from rayfin.training.spec import TrialResult
from rayfin.tuning.curve_bank import CurveBank, Ending
from rayfin.tuning.curves import Curve, past_curves, reference_curves
from rayfin.tuning.plan import RESULT, TRIAL, PlannedTrial, SweepPlan

_RIVAL_SHARES = tuple((place + 0.5) / 10 for place in range(10))
"""The quantiles that stand for what a running trial may come to."""


class PredictiveStopping:
    """Stops a trial whose probability to end better than the best is below a stated rate.

    The best is the best finished trial's score, or what a running trial is predicted to come to. As
    each stop is made at a probability below `rate`, of the trials that are stopped at most that
    share would have ended better, where the predictions hold what they say. A trial that was ahead
    of the best at the same share of its steps is not stopped, whatever is predicted: early on,
    predictions may err for all trials of a task alike.

    It takes the place of one of Ray's schedulers in `ComparableScheduler`: its trials were all
    scored on the same held-out samples.
    """

    def __init__(self, bank: CurveBank, metric: str, *, rate: float, grace: float) -> None:
        """`grace`: steps, or below 1 the share of its own, before which no trial is stopped."""
        self._bank, self._metric, self._rate, self._grace = bank, metric, rate, grace
        self._sign = score_of(metric).sign
        self._best = math.inf
        self._best_curve: Curve | None = None
        self._running: dict[str, tuple[Ending, Curve]] = {}

    def stops(self, name: str, curve: Curve, step: float) -> bool:
        """Return whether a trial is to be stopped at `step`, by its curve until there."""
        chance = self.chance(name, curve)
        at = step if self._grace >= 1 else curve.shares[-1]
        if chance is None or chance >= self._rate or at < self._grace:
            return False
        self.left(name)
        return True

    def left(self, name: str) -> None:
        """Forget a trial that runs no longer: it is no rival any more."""
        self._running.pop(name, None)

    def finished(self, value: float, curve: Curve | None = None) -> None:
        """Take the score of a trial that has finished, and its curve."""
        if self._sign * value < self._best:
            self._best, self._best_curve = self._sign * value, curve

    def chance(self, name: str, curve: Curve) -> float | None:
        """Return an upper bound of the probability that a running trial ends as the best.

        None where nothing can be said. The trial counts as a rival of the others from now on.
        """
        ending = self._bank.ending(curve)
        if ending is None:
            return None
        self._running[name] = ending, curve
        chances = []
        if math.isfinite(self._best) and not _is_ahead(curve, self._best_curve):
            chances.append(ending.below(self._best))
        for other, (rival, rival_curve) in self._running.items():
            if other != name and not _is_ahead(curve, rival_curve):
                ends = [rival.quantile(share) for share in _RIVAL_SHARES]
                chances.append(sum(map(ending.below, ends)) / len(ends))
        return min(chances, default=1.0)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Do nothing: a trial is known by its first evaluation."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        """Return STOP or CONTINUE, as Tune has them."""
        planned: PlannedTrial = trial.config[TRIAL]
        told: TrialResult = result[RESULT]
        steps = told.max_steps or planned.spec.train.max_steps
        curve = _curve(planned, told, steps, self._metric)
        if curve is None:
            return "CONTINUE"
        return "STOP" if self.stops(trial.trial_id, curve, result["step"]) else "CONTINUE"

    def on_trial_complete(
        self, tune_controller: Any, trial: Any, result: Mapping[str, Any]
    ) -> None:
        """Take the score of a trial that has run to its end; others are rivals no more."""
        self.left(trial.trial_id)
        told: TrialResult = result[RESULT]
        value = result.get(self._metric)
        if told.status != "finished" or value is None or not math.isfinite(value):
            return
        planned: PlannedTrial = trial.config[TRIAL]
        curve = _curve(planned, told, told.max_steps or planned.spec.train.max_steps, self._metric)
        self.finished(value, curve)
        if curve is not None:
            self._bank.add(curve)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Forget a trial that failed."""
        self.left(trial.trial_id)


def _is_ahead(curve: Curve, of: Curve | None) -> bool:
    """Return whether a curve is better than another one where both were seen."""
    if of is None:
        return False
    share = min(curve.shares[-1], of.shares[-1])
    return curve.at(share) < of.at(share)


def _curve(planned: PlannedTrial, told: TrialResult, steps: int, metric: str) -> Curve | None:
    train = {"max_steps": steps, "lr_scheduler_type": planned.spec.train.lr_scheduler_type}
    row = {"spec": {"train": train}, "curve": told.curve, "metrics": told.metrics}
    return Curve.of(row, metric, ended=False)


def stopping_for(plan: SweepPlan, history: History) -> Callable[[], PredictiveStopping]:
    """Return what makes the early stopping of each group of a sweep's trials that compare.

    All groups learn from the curves that come with rayfin, and from those of the history's newest
    trials; a curve is known by its shape, whatever was scored.
    """
    sweep, train = plan.config.sweep, plan.config.train
    past = (*reference_curves(), *past_curves(history, sweep.metric))
    bank = CurveBank(past, keeps_best=train.keep == "best")

    def new() -> PredictiveStopping:
        return PredictiveStopping(
            bank, sweep.metric, rate=sweep.wrong_stop_rate, grace=sweep.grace_period or 0.0
        )

    return new
