"""Early stopping of weak trials: Ray Tune's ASHA on the rungs that past trials have reached, or by
what their curves say."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from rayfin.compat.ray_tune import record_rung
from rayfin.config.steps import share_of_steps
from rayfin.history import History, TrialRecord
from rayfin.history.comparable import comparison_groups
from rayfin.history.record import finite
from rayfin.metrics import score_of
from rayfin.tuning.curves import Curve
from rayfin.tuning.plan import SweepPlan
from rayfin.tuning.predictive import stopping_for
from rayfin.tuning.space import ends_of


def scheduler(plan: SweepPlan, known: Sequence[TrialRecord], history: History) -> Any:
    """Return a sweep's early stopping as its `known` trials left it: ASHA with their rungs, say.

    A trial is compared with those that were scored on the same held-out samples: see
    `rayfin.history.comparable`.

    Trials of epochs are compared where each has trained the same share of its own steps: that is
    where their learning rates stand alike. Rungs in steps compare equally many steps, whatever the
    trials' lengths.
    """
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

    from rayfin.tuning.hooks import ComparableScheduler

    sweep, train = plan.config.sweep, plan.config.train
    if sweep.scheduler == "none":
        return FIFOScheduler()
    groups = comparison_groups(known, sweep.metric)
    if sweep.scheduler == "predictive":
        predictive = ComparableScheduler(sweep.metric, stopping_for(plan, history))
        for row, group in zip(known, groups, strict=True):
            value = finite(row.metrics.get(sweep.metric))
            if row.status == "finished" and value is not None:
                predictive.of(group).finished(value, Curve.of(row, sweep.metric))
        return predictive
    epochs = train.num_train_epochs is not None or _EPOCHS in sweep.parameters
    in_shares = epochs if sweep.grace_period is None else sweep.grace_period < 1
    longest = longest_trial(plan)
    if in_shares:
        grace = sweep.grace_period or train.eval_steps or 0.25
        # Ray says that these are whole numbers, and compares any.
        times: dict[str, Any] = {"time_attr": "share", "max_t": 1.0}
        times["grace_period"] = min(1.0, grace if grace < 1 else grace / longest)
    else:
        times = {"time_attr": "step", "max_t": longest}
        times["grace_period"] = min(sweep.grace_period or train.evaluate_every, longest)

    def new() -> AsyncHyperBandScheduler:
        return AsyncHyperBandScheduler(
            metric=sweep.metric,
            mode=sweep.direction,
            reduction_factor=sweep.reduction_factor,
            stop_last_trials=False,
            **times,
        )

    asha = ComparableScheduler(sweep.metric, new)
    metric = score_of(sweep.metric)
    for row, group in zip(known, groups, strict=True):
        for point in row.curve:
            if (value := metric.at(point)) is not None:
                step = point["step"]
                at = share_of_steps(step, row.spec["train"]["max_steps"]) if in_shares else step
                record_rung(asha.of(group), row.trial_id, at, -metric.sign * value)
    return asha


_EPOCHS = "train.num_train_epochs"
_LENGTHS = frozenset(
    {
        *(_EPOCHS, "train.max_steps", "train.per_device_train_batch_size"),
        "train.gradient_accumulation_steps",
    }
)
_TOKENS = frozenset(
    f"data.{name}" for name in ("max_length", "truncation", "system", "chat_template", "encoding")
)


def _decides_length(axis: str) -> bool:
    """Return whether the number of a trial's steps depends on an axis: on its rows, for one."""
    return axis in _LENGTHS or (axis.startswith("data.") and axis not in _TOKENS)


def longest_trial(plan: SweepPlan) -> int:
    """Return the steps of the longest trial of a sweep."""
    space = plan.space
    first = space.point(lambda _, choices: ends_of(choices)[0])
    axes = [axis for axis in first if _decides_length(axis)]
    lengths = [[(axis, v) for v in ends_of(space.axes[axis])] for axis in axes]
    points = (first | dict(chosen) for chosen in itertools.product(*lengths))
    return max(plan.trial(point).spec.train.max_steps for point in points)
