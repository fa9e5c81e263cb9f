"""All candidates of a recommendation by what they cost and what they lose."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rayfin.advisor.answer import TradeOffPoint
from rayfin.advisor.feasibility import AssessedCandidate
from rayfin.advisor.kernel import Array


def trade_offs(options: Sequence[AssessedCandidate], regrets: Array) -> list[TradeOffPoint]:
    """Return all feasible candidates, with the Pareto front of shortfall and time marked."""
    seconds = [option.estimate.seconds.expected for option in options]
    best, front = math.inf, set()
    for at in sorted(range(len(options)), key=lambda at: (seconds[at], regrets[at])):
        if regrets[at] < best:
            best = float(regrets[at])
            front.add(at)
    return [
        TradeOffPoint(
            method=option.candidate.method,
            settings={
                name: value
                for name, value in option.candidate.settings.items()
                if name == "train.learning_rate" or name.startswith("method.")
            },
            shortfall=float(regrets[at]),
            train_seconds=seconds[at],
            memory_bytes=option.estimate.memory.expected,
            front=at in front,
        )
        for at, option in enumerate(options)
    ]
