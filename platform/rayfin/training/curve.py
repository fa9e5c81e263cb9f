"""The curve of a trial: what was measured while it trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rayfin.metrics import GENERATIONS, METRICS, Score


def curve_of(logged: Iterable[Mapping[str, Any]], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Return what `TrialResult.curve` has of a trainer's log, in the order in which it came.

    `metrics` are the scores of the trial's objective; one that is another's exponential is left
    out.
    """
    scores = ((name, METRICS[name]) for name in metrics)
    kept = (
        *("loss", "learning_rate", GENERATIONS),
        *(name for name, it in scores if isinstance(it, Score) and not it.exponential_of),
    )
    points = ({key: entry[key] for key in ("step", *kept) if key in entry} for entry in logged)
    return [point for point in points if len(point) > 1]
