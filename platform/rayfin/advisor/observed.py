"""Turn the trials of scenarios into a process's observations, each with its own noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rayfin.advisor.doubt import excess_noise
from rayfin.advisor.features import COLUMNS
from rayfin.advisor.gaussian_process import Observations
from rayfin.advisor.kernel import Array, Hyperparameters
from rayfin.advisor.prior import prior_mean
from rayfin.advisor.trial_table import ScenarioTrials

SMALL_GROUP = 4.0
"""The number of trials from which a group's best is known about as well as a setting's regret."""


def observations_of(
    groups: Sequence[ScenarioTrials], most: int, most_of_group: int, parameters: Hyperparameters
) -> tuple[Observations, NDArray[np.intp], Array, NDArray[np.bool_], Array]:
    """Return the observations of the first groups, at most `most`, spread evenly over their
    regrets.

    The other results are the index of each observation's first trial in the table, the share of
    its trials that diverged, whether it is an outlier, and its source's scatter.
    """
    parts = []
    left = most
    for group in groups:
        chosen = _subsample(group, min(most_of_group, left))
        left -= len(chosen)
        small = np.full(len(chosen), 1.0 + SMALL_GROUP / len(group))
        rows, usual = group.rows[chosen], small / group.counts[chosen]
        values = group.regrets[chosen] - prior_mean(rows)
        excess, outliers, scatter = excess_noise(rows, values, usual, group.sources[chosen])
        parts.append(
            (
                rows,
                values,
                usual + excess / parameters["noise"] ** 2,
                small,
                group.first[chosen],
                group.diverged[chosen],
                outliers,
                scatter,
            )
        )
        if left <= 0:
            break
    if not parts:
        none = np.zeros(0, dtype=np.intp)
        return Observations.none(COLUMNS), none, np.zeros(0), none.astype(bool), np.zeros(0)
    *seen, first_trials, diverged, outliers, scatter = map(np.concatenate, zip(*parts, strict=True))
    return Observations(*seen), first_trials, diverged, outliers, scatter


def _subsample(group: ScenarioTrials, most: int) -> NDArray[np.intp]:
    """Return the indices of at most `most` of a group's settings, from the best to the worst."""
    if len(group) <= most:
        return np.arange(len(group))
    order = np.argsort(group.regrets, kind="stable")
    chosen: NDArray[np.intp] = order[np.unique(np.linspace(0, len(order) - 1, most).astype(int))]
    return chosen
