"""Best trials at the edge of a range: a better value may lie beyond it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rayfin.config import Config, Space
from rayfin.errors import RayfinError
from rayfin.history import TrialRecord
from rayfin.history.comparable import comparable
from rayfin.statuses import SCORED
from rayfin.training.combination import check_combination
from rayfin.tuning.space import SearchSpace

_NEAR = 0.1
"""The share of a range, on its own scale, that counts as its edge."""
_MOST = 4
"""The number of best trials that are looked at."""


def edge_notes(space: SearchSpace, rows: Sequence[TrialRecord]) -> list[str]:
    """Returns a sentence for each axis of which the best trials lie at the same edge.

    Looked at are the better half of the trials that have the metric, at most four and at least two,
    those that ran to the end before those that were stopped. An axis is named where the best trial
    is at an edge, and more than half of them with it; not where the setting can't go further.
    """
    best = _best(space.config, rows)
    if len(best) < 2:
        return []
    found = []
    for axis, choices in space.axes.items():
        sides = [_side(choices, space.values_in(row.spec).get(axis)) for row in best]
        side, count = sides[0], sides.count(sides[0])
        if side is None or 2 * count <= len(best) or not _continues(space, best[0], axis, side):
            continue
        who = "both of the 2" if count == len(best) == 2 else f"{count} of the {len(best)}"
        edge = f"{_end(choices, side):.3g}"
        what = "range" if isinstance(choices, Space) else "list of values"
        found.append(
            f"{who} best trials have {axis} at the {side} edge of its {what} ({edge}): widen it"
        )
    return found


def _best(config: Config, rows: Sequence[TrialRecord]) -> list[TrialRecord]:
    metric = config.sweep.metric
    sign = 1.0 if config.sweep.direction == "min" else -1.0
    scored = comparable(rows, metric, SCORED)
    if len({row.metrics[metric] for row in scored}) < 2:
        return []  # none is better than another
    scored.sort(key=lambda row: (row.status != "finished", sign * float(row.metrics[metric])))
    return scored[: min(_MOST, len(scored) // 2)]


def _side(choices: Any, value: Any) -> str | None:
    """Return `upper` or `lower`; None for what lies between, or has no order."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not isinstance(choices, Space):
        numbers = [c for c in choices if isinstance(c, int | float) and not isinstance(c, bool)]
        if len(numbers) < max(3, len(choices)):
            return None
        return {max(numbers): "upper", min(numbers): "lower"}.get(value)
    scale: Callable[[float], float] = math.log if choices.space == "loguniform" else float
    low, high = scale(choices.lower), scale(choices.upper)
    at = (scale(value) - low) / (high - low)
    return "upper" if at >= 1 - _NEAR else "lower" if at <= _NEAR else None


def _end(choices: Any, side: str) -> float:
    if isinstance(choices, Space):
        return choices.upper if side == "upper" else choices.lower
    return float(max(choices) if side == "upper" else min(choices))


def _continues(space: SearchSpace, best: TrialRecord, axis: str, side: str) -> bool:
    """Whether the configuration takes a value a little beyond the edge."""
    choices = space.axes[axis]
    end = _end(choices, side)
    if isinstance(choices, Space):
        whole, even = choices.space == "randint", choices.space == "uniform"
        step = _NEAR * (choices.upper - choices.lower)
    else:
        whole, even, step = all(isinstance(choice, int) for choice in choices), False, 0.0
    if even:
        beyond = end + step if side == "upper" else end - step
    else:
        beyond = end * 2 if side == "upper" else end / 2
    value = int(beyond) if whole else beyond
    if value == end:  # 0, of which there is no half and no double
        return False
    try:
        check_combination(space.config_of(space.values_in(best.spec) | {axis: value}))
    except RayfinError:
        return False
    return True
