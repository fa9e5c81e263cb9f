"""Which evaluation of a trial is the best, and whether it still gets better, by its curve alone.

A resumed trial has the curve of the part before, and so it decides as one that ran through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rayfin.metrics import score_of

Curve = Sequence[Mapping[str, Any]]
"""Points {step, loss} and {step, eval_loss, …} in the order they came."""


def best_step(curve: Curve, metric: str) -> int | None:
    """Return the step of the best evaluation, the first of equal ones; None where there is none."""
    return min(_evaluations(curve, metric), key=lambda each: each[1], default=(None, 0.0))[0]


def evaluations_without_gain(curve: Curve, metric: str, threshold: float) -> int:
    """Return the evaluations in a row, up to the last, that were not better than the best before.

    As Transformers' EarlyStoppingCallback counts: better by more than `threshold`, and better than
    the best so far, even where that was itself not counted as better.
    """
    count, best = 0, None
    for _, value in _evaluations(curve, metric):
        count = 0 if best is None or best - value > threshold else count + 1
        best = value if best is None else min(best, value)
    return count


def _evaluations(curve: Curve, metric: str) -> Iterator[tuple[int, float]]:
    """Yield the step and the score of each evaluation; less is better."""
    score = score_of(metric)
    for point in curve:
        if (value := score.at(point)) is not None:
            yield point["step"], score.sign * value
