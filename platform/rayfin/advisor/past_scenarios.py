"""What settings came to in each past scenario, as whole functions.

A new scenario is rarely between two past ones, as samples of the Gaussian process are, but much
like one or the other; a second choice should cover for those.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from rayfin.advisor.features import COLUMNS
from rayfin.advisor.kernel import Array
from rayfin.advisor.model_sizes import is_toy
from rayfin.advisor.trial_table import ScenarioTrials

_DECADES = 2.0
"""The decades by which a past scenario's model may be smaller or larger: the best rates of the
public sweep's models hardly move with their size. Chosen on its given models, left out by
generation."""
_FEWEST = 5
"""The settings that a scenario needs, so that the nearest of them says something of any other."""
_RATE, _CAPACITY = (COLUMNS.names.index(name) for name in ("learning_rate", "capacity"))
_METHOD = COLUMNS.indices(("method_x", "method_y"))
_OCTAVES_A_DECADE = 10.0
"""The octaves of capacity that count as much as a decade of the learning rate."""


def past_scenarios(
    groups: Iterable[ScenarioTrials], scenario: Mapping[str, float]
) -> list[ScenarioTrials]:
    """Return the scenarios other than `scenario` that a choice may cover for."""
    size = scenario.get("parameters", math.nan)
    return [
        group
        for group in groups
        if group.code != scenario.get("group")
        and len(group) >= _FEWEST
        and abs((own := _of(group, "parameters")) - size) <= _DECADES
        and not is_toy(10.0**own)
    ]


def has_relative(groups: Iterable[ScenarioTrials], scenario: Mapping[str, float]) -> bool:
    """Whether one of the scenarios has a model of the same brand and generation."""
    names = ("brand", "generation")
    return any(all(_of(group, name) == scenario.get(name) for name in names) for group in groups)


def past_regrets(groups: Sequence[ScenarioTrials], rows: Array, expected: Array) -> Array:
    """Return the regrets of n settings in each of m past scenarios (m x n).

    It is the regret of the nearest setting that was tried there with the same method, and
    `expected` (n) where there is none.
    """
    found = np.tile(expected, (len(groups), 1))
    for number, group in enumerate(groups):
        here, there = rows[:, None], group.rows[None]
        away = _OCTAVES_A_DECADE * _distance(here, there, _RATE)
        away = away + _distance(here, there, _CAPACITY)
        same = (np.abs(here[..., _METHOD] - there[..., _METHOD]) < 1e-6).all(axis=-1)
        away = np.where(same, away, np.inf)
        nearest = away.argmin(axis=1)
        known = np.isfinite(away.min(axis=1))
        found[number, known] = group.regrets[nearest[known]]
    return found


def _distance(here: Array, there: Array, column: int) -> Array:
    """Return the distances in a column; an unknown value is a whole unit away from any."""
    found: Array = np.nan_to_num(np.abs(here[..., column] - there[..., column]), nan=1.0)
    return found


def _of(group: ScenarioTrials, name: str) -> float:
    return float(group.rows[0, COLUMNS.names.index(name)])
