"""How good a setting will be in a scenario, learned from the trials of all scenarios.

The quality of a setting is its charge: 0 for the best that is known in its scenario, 1 for the
worst and for a training that diverges (`table.Group`). A Gaussian process predicts what a setting's
charge differs by from what practice expects of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rayfin.advisor.features import COLUMNS
from rayfin.advisor.process import Array, Observations, Parameters, Process, fit, kinship
from rayfin.advisor.reach import is_toy, within_reach
from rayfin.advisor.table import ScenarioTrials, TrialTable, groups_of
from rayfin.methods.rates import lora_rate

FITTED, PREDICTED = 400, 500
"""Settings that the parameters are learned from, and that a prediction rests on, at most.

The time of both grows with the cube, and the nearest scenarios say nearly all there is to say.
"""
_FITTED_OF_GROUP, _PREDICTED_OF_GROUP = 30, 60
_SMALL_GROUP = 4.0
"""Trials from which a group's best is known about as well as a setting's charge is."""
DRAWS = 1024
_ANY_SIZE = 10.0  # decades: 10 billion parameters, whose rate practice takes for any
_BY_SIZE = 1.5  # coordinates below it: those of methods whose rate is a share of LoRA's


def expected(rows: Array) -> Array:
    """What practice expects: a charge that grows with the distance from the usual learning rate.

    0.25 at it, 0.35 at three times more or less, 0.6 at fifteen times: enough to decide where no
    trial does, and little enough for a few of them to overrule. The usual rate is that of the
    model's size, where this is known.
    """
    decades = np.nan_to_num(rows[:, COLUMNS.names.index("learning_rate")], nan=0.5)
    sizes = np.nan_to_num(rows[:, COLUMNS.names.index("parameters")], nan=_ANY_SIZE)
    usual = np.array([math.log10(lora_rate(10 ** (size - 9))) for size in sizes])
    by_size = (rows[:, COLUMNS.indices(("method_x", "method_y"))] < _BY_SIZE).all(axis=1)
    decades = decades - np.where(by_size, usual - math.log10(lora_rate()), 0.0)
    charge: Array = 0.25 + 0.4 * (1.0 - np.exp(-((decades / 0.9) ** 2)))
    return charge


@dataclass(frozen=True)
class Evidence:
    """The groups of a history, and the process' parameters learned from them."""

    groups: Mapping[float, ScenarioTrials]
    parameters: Parameters

    @classmethod
    def of(
        cls, table: TrialTable, metric: str | None = None, start: Parameters | None = None
    ) -> Self:
        """Learned from all of `table`; a few seconds at most."""
        groups = groups_of(table, metric)
        return cls(groups, learned(groups, start))

    def near(self, scenario: Mapping[str, float], own: ScenarioTrials | None = None) -> Near:
        """What is known for `scenario`, from the groups nearest to it; `own` is its own, if any.

        Groups whose models are out of reach (`informs`) are left out.
        """
        groups = {code: group for code, group in self.groups.items() if informs(group, scenario)}
        nearest = _nearest(groups, scenario, self.parameters)
        chosen = [self.groups[code] for code in nearest]
        if own is not None:
            chosen = [own, *(group for group in chosen if group.code != scenario["group"])]
        seen, places, diverged = _observations(chosen, PREDICTED, _PREDICTED_OF_GROUP)
        return Near(Process(COLUMNS, self.parameters, seen), places, diverged)


@dataclass(frozen=True)
class Near:
    """A process that has seen the settings nearest to a scenario."""

    process: Process
    trials: NDArray[np.intp]
    """Of each observation, its first trial's place in the table."""
    diverged: Array
    """The share of its trials that diverged."""

    def divergence(self, rows: Array) -> Array:
        """Probabilities that a training at `rows` diverges: the share of those alike that did.

        A setting that nobody tried takes the share of all, as far as it is unlike them.
        """
        usual = float(self.diverged.mean()) if len(self.diverged) else 0.0
        seen: Array = usual + self.process.mean_of(self.diverged - usual, rows)
        return np.clip(seen, 0.0, 1.0)


def relevance(process: Process, rows: Array, sets: NDArray[Any] | None = None) -> Array:
    """How much of the doubt about which of `rows` is better its trials have taken away: 0 to 1.

    Of the variance of the rows' differences, as the process expects it before any trial; for each
    row that of its own set, all rows that have the same name in `sets`, else of all rows.
    """
    found = np.zeros(len(rows))
    if not len(process.observations):
        return found
    nothing = Process(COLUMNS, process.parameters, Observations.none(COLUMNS))
    covariances = [one.predict(rows)[1] for one in (nothing, process)]
    names = np.zeros(len(rows)) if sets is None else sets
    for name in np.unique(names):
        own = names == name
        before, after = (_spread(covariance[np.ix_(own, own)]) for covariance in covariances)
        found[own] = np.clip(1.0 - after / before, 0.0, 1.0) if before > 0 else 0.0
    return found


def observed(rows: Array, charges: Array) -> Observations:
    """One scenario's trials, each worth as much as its group is large."""
    small = np.full(len(charges), 1.0 + _SMALL_GROUP / max(1, len(charges)))
    return Observations(rows, charges - expected(rows), small, small)


def joined(process: Process, more: Observations) -> Process:
    """`process`, with `more` seen besides."""
    both = zip(vars(process.observations).values(), vars(more).values(), strict=True)
    seen = Observations(*(np.concatenate(parts) for parts in both))
    return Process(process.columns, process.parameters, seen)


def _spread(covariance: Array) -> float:
    """Mean variance of the differences from the rows' mean."""
    return float(covariance.diagonal().mean() - covariance.mean())


def size_of(group: ScenarioTrials) -> float:
    """Parameters of the group's model; NaN where they are not known."""
    return float(10.0 ** group.rows[0, COLUMNS.names.index("parameters")])


def informs(group: ScenarioTrials, scenario: Mapping[str, float]) -> bool:
    """Whether a group's trials say anything about `scenario`: models of about its size do.

    A toy's count for the same model alone, and those of a model of unknown size for its family.
    """
    here = dict(zip(COLUMNS.names, group.rows[0].tolist(), strict=True))
    family = all(here[name] == scenario.get(name) for name in ("brand", "generation"))
    there, size = size_of(group), 10.0 ** scenario.get("parameters", math.nan)
    if math.isnan(there) or math.isnan(size):
        return family
    return family and math.isclose(there, size) if is_toy(there) else within_reach(there, size)


def learned(groups: Mapping[float, ScenarioTrials], start: Parameters | None = None) -> Parameters:
    """The process' parameters; those of the priors where there is nothing to learn from.

    Toy models teach nothing here: what is learned is used for all others.
    """
    telling = [code for code, group in groups.items() if not is_toy(size_of(group))]
    if not telling:
        return Parameters.expected(COLUMNS)
    order = np.random.default_rng(0).permutation(sorted(telling))
    seen, *_ = _observations([groups[code] for code in order], FITTED, _FITTED_OF_GROUP)
    return fit(COLUMNS, seen, start)


def draws(process: Process, rows: Array, *, measured: bool = False, seed: int = 0) -> Array:
    """Charges (draws x rows) that are as likely as what is known lets them be, drawn together.

    `measured`: as a new trial would measure them, with the noise, and relative to a best that
    nobody knows yet: what intervals are about. To compare settings, both are in the way.
    """
    mean, covariance = process.predict(rows)
    root = _root(covariance)
    random = np.random.default_rng(seed)
    charges = expected(rows) + mean + random.standard_normal((DRAWS, len(rows))) @ root.T
    if measured:
        small = np.sqrt(1.0 + 1.0 / _SMALL_GROUP)
        level = process.parameters["offset"] * small * random.standard_normal((DRAWS, 1))
        noise = process.parameters["noise"] * small * random.standard_normal(charges.shape)
        charges = charges + level + noise
    clipped: Array = np.clip(charges, 0.0, 1.0)
    return clipped


def _root(covariance: Array) -> Array:
    """A matrix whose product with its transpose is `covariance`."""
    symmetric = (covariance + covariance.T) / 2
    try:
        return np.asarray(np.linalg.cholesky(symmetric + 1e-9 * np.eye(len(symmetric))))
    except np.linalg.LinAlgError:  # rounding has made it indefinite; this takes ten times as long
        values, vectors = np.linalg.eigh(symmetric)
        return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))


def choose(charges: Array, k: int, cost: Array | None = None) -> list[int]:
    """The k rows whose best is least charged in expectation, one after the other.

    Each next one is for where those before it go wrong: it covers for them, and does not repeat
    them. `cost` is added to each row's charge.
    """
    chosen: list[int] = []
    left = np.ones((len(charges), 1))
    paid = charges if cost is None else charges + cost
    for _ in range(min(k, charges.shape[1])):
        gain = np.minimum(paid, left).mean(axis=0)
        gain += 1e-6 * paid.mean(axis=0)  # of two that cover the same, the better one
        gain[chosen] = np.inf
        chosen.append(int(gain.argmin()))
        left = np.minimum(left, paid[:, chosen[-1]][:, None])
    return chosen


def _nearest(
    groups: Mapping[float, ScenarioTrials], scenario: Mapping[str, float], parameters: Parameters
) -> list[float]:
    """Codes of the groups, those of the most similar scenarios first."""
    if not groups:
        return []
    here = np.array([scenario.get(name, np.nan) for name in COLUMNS.names])
    rows = np.array([group.rows[0] for group in groups.values()])
    order = np.argsort(-kinship(COLUMNS, parameters, here, rows), kind="stable")
    codes = list(groups)
    return [codes[place] for place in order]


def _observations(
    groups: Sequence[ScenarioTrials], most: int, most_of_group: int
) -> tuple[Observations, NDArray[np.intp], Array]:
    """The first groups' settings, so many at most, thinned evenly over their charges.

    Beside them, the place of each one's first trial, and the share of its trials that diverged.
    """
    parts = []
    left = most
    for group in groups:
        chosen = _thinned(group, min(most_of_group, left))
        left -= len(chosen)
        small = 1.0 + _SMALL_GROUP / len(group)
        parts.append(
            (
                group.rows[chosen],
                group.charges[chosen] - expected(group.rows[chosen]),
                small / group.counts[chosen],
                np.full(len(chosen), small),
                group.first[chosen],
                group.diverged[chosen],
            )
        )
        if left <= 0:
            break
    if not parts:
        return Observations.none(COLUMNS), np.zeros(0, dtype=np.intp), np.zeros(0)
    *seen, places, diverged = map(np.concatenate, zip(*parts, strict=True))
    return Observations(*seen), places, diverged


def _thinned(group: ScenarioTrials, most: int) -> NDArray[np.intp]:
    """Places of so many of its settings at most, from the best to the worst."""
    if len(group) <= most:
        return np.arange(len(group))
    order = np.argsort(group.charges, kind="stable")
    chosen: NDArray[np.intp] = order[np.unique(np.linspace(0, len(order) - 1, most).astype(int))]
    return chosen
