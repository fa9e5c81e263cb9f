"""What the report's charts are drawn from: plain JSON, with None for what was not measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rayfin.advisor.chart_marks import MARKS, mark_number
from rayfin.config import Config, Space
from rayfin.evaluation.quantities import setting, show_setting, unit_for
from rayfin.history.comparable import not_comparable
from rayfin.history.record import finite
from rayfin.metrics import COSTS, METRICS

if TYPE_CHECKING:
    from rayfin.history.record import TrialRecord

# Points of training loss in one page; beyond it a browser gets slow and the line no clearer.
_LOSS_POINTS = 20_000


def ordered(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the trials in the order in which they were started, as the report numbers them."""
    return sorted(trials, key=lambda trial: (trial.created_at, trial.trial_id))


def chart_data(
    trials: Sequence[TrialRecord], config: Config, best: TrialRecord | None
) -> dict[str, Any]:
    """The JSON block of a report; `trials` in the order of their numbers."""
    sweep = config.sweep
    metric, divisor = _axis(sweep.metric, trials)
    costs = []
    for key in COSTS:
        cost, cost_divisor = _axis(key, trials)
        values = [_scaled(trial.metrics.get(key), cost_divisor) for trial in trials]
        if any(value is not None for value in values):
            costs.append({**cost, "values": values})
    others = not_comparable(trials, sweep.metric, best)
    other_losses = not_comparable(trials, "eval_loss", best)
    thinnest = max(50, _LOSS_POINTS // max(1, len(trials)))
    return {
        "metric": {**metric, "mode": sweep.direction},
        "baseLoss": _base_loss(trials, best),
        "costs": costs,
        "marks": MARKS,
        "methods": _methods(trials),
        "parameters": [_parameter(name, axis, trials) for name, axis in sweep.parameters.items()],
        "trials": [
            {
                "number": number,
                "id": trial.trial_id,
                "status": trial.status,
                "look": mark_number(setting(trial.spec, "method.type")[1]),
                "best": best is not None and trial.trial_id == best.trial_id,
                # Scores of other held-out samples have no place on one axis with the best trial's.
                "other": other,
                "metric": None if other else _scaled(trial.metrics.get(sweep.metric), divisor),
                "loss": _thin(_points(trial.curve, "loss"), thinnest),
                "evalLoss": [] if losses else _points(trial.curve, "eval_loss"),
            }
            for number, (trial, other, losses) in enumerate(
                zip(trials, others, other_losses, strict=True), 1
            )
        ],
    }


def _methods(trials: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """The methods that the trials have, with the number of their colour and mark."""
    names = {setting(trial.spec, "method.type")[1] for trial in trials}
    looks = sorted((look, name) for name in names if (look := mark_number(name)) is not None)
    return [{"name": name, "look": look} for look, name in looks]


def _axis(name: str, trials: Sequence[TrialRecord]) -> tuple[dict[str, str], float]:
    values = [value for t in trials if (value := finite(t.metrics.get(name))) is not None]
    unit, divisor = unit_for(name, values)
    return {"key": name, "label": METRICS[name].label, "unit": unit}, divisor


def _scaled(value: Any, divisor: float) -> float | None:
    number = finite(value)
    return None if number is None else number / divisor


def _base_loss(trials: Sequence[TrialRecord], best: TrialRecord | None) -> float | None:
    """The base model's own eval loss: the best trial's measurement, or the first there is."""
    for trial in ([best] if best else []) + list(trials):
        if (value := finite(trial.metrics.get("base_eval_loss"))) is not None:
            return value
    return None


def _points(curve: Sequence[Mapping[str, Any]], key: str) -> list[list[float]]:
    pairs = [(finite(point.get("step")), finite(point.get(key))) for point in curve]
    return sorted([step, value] for step, value in pairs if step is not None and value is not None)


def _thin(points: list[list[float]], most: int) -> list[list[float]]:
    """Every k-th point, and the last."""
    stride = -(-len(points) // most) if points else 1
    kept = points[::stride]
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def _parameter(name: str, axis: Any, trials: Sequence[TrialRecord]) -> dict[str, Any]:
    """An axis of the parallel coordinates and each trial's value on it (None where it has none).

    A range gives numbers; choices give positions in `choices`, in the order they were written.
    """
    found = [setting(trial.spec, name) for trial in trials]
    if isinstance(axis, Space):
        return {
            "name": name,
            "kind": "log" if axis.space == "loguniform" else "linear",
            "lower": axis.lower,
            "upper": axis.upper,
            "values": [finite(value) if has else None for has, value in found],
        }
    # 8 and 8.0 are one choice, [a] and (a,) too: compared as they would be written.
    choices = {_written(value): show_setting(value) for value in axis}
    choices |= {
        _written(value): show_setting(value)
        for has, value in found
        if has and _written(value) not in choices
    }
    places = {key: place for place, key in enumerate(choices)}
    return {
        "name": name,
        "kind": "choice",
        "choices": list(choices.values()),
        "values": [places[_written(value)] if has else None for has, value in found],
    }


def _written(value: Any) -> str:
    number = finite(value)
    return json.dumps(value if number is None else number, default=str)
