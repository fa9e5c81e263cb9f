"""Predict how good a setting will be in a scenario, from the trials of all scenarios.

The measure is a setting's regret: 0 for the best setting known in its scenario, 1 for the worst and
for a training that diverges (`ScenarioTrials`). A Gaussian process predicts by how much a setting's
regret differs from what practice expects (`prior_mean`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rayfin.advisor.doubt import PRIOR
from rayfin.advisor.features import COLUMNS
from rayfin.advisor.gaussian_process import (
    GaussianProcess,
    Observations,
    fit,
    relatedness,
)
from rayfin.advisor.kernel import Array, Hyperparameters
from rayfin.advisor.model_sizes import is_comparable, is_toy
from rayfin.advisor.observed import SMALL_GROUP, observations_of
from rayfin.advisor.past_scenarios import has_relative, past_regrets, past_scenarios
from rayfin.advisor.prior import prior_divergence, prior_mean
from rayfin.advisor.trial_table import ScenarioTrials, TrialTable, group_by_scenario

MAX_FITTED, MAX_OBSERVED = 400, 500
"""The most settings that hyperparameters are learned from, and that a prediction rests on.

The time of both grows with the cube, and the most related scenarios say nearly all there is to say.
"""
_MAX_FITTED_OF_GROUP, _MAX_OBSERVED_OF_GROUP = 30, 60
SAMPLES = 1024
LEARNED = 0.2
"""The relevance of past trials from which they decide rather than the rules.

A sweep of twenty settings with one model leaves more than that to a sibling's; five trials with
losses drawn at random take away less. It was set on the public sweep of LoRA's rates.
"""
_PAST_SHARE = 0.6
"""How much past scenarios count in a choice, beside the samples; anything from 0.5 to 0.75 chose
the same on the public sweep's given models, left out one by one, by generation and by brand."""
_SCALE = 0.5
"""The deviation of the factor between a scenario's regrets and what its relatives' say.

A regret is a share of the difference to the worst score that was seen, and how bad that is varies
from one scenario to the next. Chosen on the public sweep's given models, so that the intervals of
the worst one hold most of its settings.
"""


@dataclass(frozen=True)
class QualityModel:
    """The scenarios of a history with their trials, and the hyperparameters learned from them."""

    groups: Mapping[float, ScenarioTrials]
    parameters: Hyperparameters

    @classmethod
    def of(
        cls, table: TrialTable, metric: str | None = None, start: Hyperparameters | None = None
    ) -> Self:
        """Learn from all trials of a table, in a few seconds at most; `start` shortens that."""
        groups = group_by_scenario(table, metric)
        return cls(groups, fit_hyperparameters(groups, start))

    def posterior(
        self, scenario: Mapping[str, float], own: ScenarioTrials | None = None
    ) -> ScenarioPosterior:
        """Condition the process on the trials of the scenarios most related to `scenario`.

        `own` are trials of the scenario itself, if any. Scenarios that say nothing about this one
        (`is_informative`) are left out.
        """
        groups = {
            code: group for code, group in self.groups.items() if is_informative(group, scenario)
        }
        nearest = _by_relatedness(groups, scenario, self.parameters)
        chosen = [self.groups[code] for code in nearest]
        if own is not None:
            chosen = [own, *(group for group in chosen if group.code != scenario["group"])]
        seen, first_trials, diverged, outliers, scatter = observations_of(
            chosen, MAX_OBSERVED, _MAX_OBSERVED_OF_GROUP, self.parameters
        )
        past = past_scenarios(self.groups.values(), scenario)
        # Trials of the scenario itself are the nearest relatives.
        tried = own is not None or scenario.get("group") in self.groups
        return ScenarioPosterior(
            GaussianProcess(COLUMNS, self.parameters, seen),
            first_trials,
            diverged,
            outliers,
            scatter,
            past,
            tried or has_relative(past, scenario),
        )


@dataclass(frozen=True)
class ScenarioPosterior:
    """The Gaussian process conditioned on the trials most related to a scenario."""

    process: GaussianProcess
    trials: NDArray[np.intp]
    """The index in the table of each observation's first trial."""
    diverged: Array
    """The share of each observation's trials that diverged."""
    outliers: NDArray[np.bool_]
    """Which observations contradict those around them, and count for little."""
    scatter: Array
    """How many times the usual deviation of noise each observation's source has."""
    past: Sequence[ScenarioTrials] = ()
    """The past scenarios that a choice covers for."""
    relative: bool = True
    """Whether the scenario itself was tried, or one of them has a model of its brand and
    generation."""

    def weights(self, rows: Array) -> Array:
        """Return each observation's share in all that moves the predictions at m rows (m x n)."""
        found = np.abs(self.process.weights(rows))
        shares: Array = found / np.maximum(found.sum(axis=1, keepdims=True), 1e-12)
        return shares

    def divergence(self, rows: Array) -> Array:
        """Return the probabilities that trainings at n rows diverge (n).

        They are the shares of similar trials that diverged, and what practice expects where none
        is similar.
        """
        observed = self.process.observations.rows
        found = prior_divergence(rows)
        if len(observed):
            unexpected = self.diverged - prior_divergence(observed)
            found = found + self.process.posterior_mean(unexpected, rows)
        return np.clip(found, 0.0, 1.0)

    def knows(self, scenario: Mapping[str, float]) -> bool:
        """Whether any of the trials is of the scenario's task or of its model's family."""
        observed = self.process.observations.rows
        return any(
            bool((observed[:, COLUMNS.names.index(name)] == scenario[name]).any())
            for name in ("task", "brand")
        )

    def past_regrets(self, rows: Array) -> Array:
        """Return what the settings of n rows come to in the past scenarios (m x n)."""
        expected = prior_mean(rows) + self.process.posterior_mean(
            self.process.observations.values, rows
        )
        return past_regrets(self.past, rows, np.clip(expected, 0.0, 1.0))


def relevance(process: GaussianProcess, rows: Array, sets: NDArray[Any] | None = None) -> Array:
    """Return the share of the variance of the rows' differences that trials have removed (n).

    It is 0 where trials say nothing about which row is better, and 1 where they say all. Each row
    is compared with those that have the same name in `sets`, or with all rows.
    """
    found = np.zeros(len(rows))
    if not len(process.observations):
        return found
    nothing = GaussianProcess(COLUMNS, process.parameters, Observations.none(COLUMNS))
    covariances = [one.predict(rows)[1] for one in (nothing, process)]
    names = np.zeros(len(rows)) if sets is None else sets
    for name in np.unique(names):
        own = names == name
        before, after = (
            _variance_of_differences(covariance[np.ix_(own, own)]) for covariance in covariances
        )
        found[own] = np.clip(1.0 - after / before, 0.0, 1.0) if before > 0 else 0.0
    return found


def regret_observations(rows: Array, regrets: Array) -> Observations:
    """Return one scenario's trials as observations, the more precise the more trials there are."""
    small = np.full(len(regrets), 1.0 + SMALL_GROUP / max(1, len(regrets)))
    return Observations(rows, regrets - prior_mean(rows), small, small)


def conditioned_on(process: GaussianProcess, more: Observations) -> GaussianProcess:
    """Return the process conditioned on further observations."""
    both = zip(vars(process.observations).values(), vars(more).values(), strict=True)
    seen = Observations(*(np.concatenate(parts) for parts in both))
    return GaussianProcess(process.columns, process.parameters, seen)


def _variance_of_differences(covariance: Array) -> float:
    """Return the mean variance of the differences from the rows' mean."""
    return float(covariance.diagonal().mean() - covariance.mean())


def model_size(group: ScenarioTrials) -> float:
    """Return the number of parameters of the scenario's model, or NaN where it is unknown."""
    return float(10.0 ** group.rows[0, COLUMNS.names.index("parameters")])


def is_informative(group: ScenarioTrials, scenario: Mapping[str, float]) -> bool:
    """Whether a group's trials say anything about `scenario`.

    Those of models of about the same size do. Those of a toy model count for that model only, and
    those of a model of unknown size for its family only.
    """
    return is_informative_row(group.rows[0], scenario)


def is_informative_row(row: Array, scenario: Mapping[str, float]) -> bool:
    """Whether a trial with these features says anything about `scenario`: see `is_informative`."""
    here = dict(zip(COLUMNS.names, row.tolist(), strict=True))
    family = all(here[name] == scenario.get(name) for name in ("brand", "generation"))
    there, size = 10.0 ** here["parameters"], 10.0 ** scenario.get("parameters", math.nan)
    if math.isnan(there) or math.isnan(size):
        return family
    return family and math.isclose(there, size) if is_toy(there) else is_comparable(there, size)


def fit_hyperparameters(
    groups: Mapping[float, ScenarioTrials], start: Hyperparameters | None = None
) -> Hyperparameters:
    """Learn the hyperparameters; without trials, they are the modes of the priors.

    Toy models are left out, as what is learned is used for all other models.
    """
    telling = [code for code, group in groups.items() if not is_toy(model_size(group))]
    if not telling:
        return Hyperparameters.expected(COLUMNS)
    order = np.random.default_rng(0).permutation(sorted(telling))
    seen, *_ = observations_of(
        [groups[code] for code in order], MAX_FITTED, _MAX_FITTED_OF_GROUP, PRIOR
    )
    return fit(COLUMNS, seen, start)


def sample_regrets(process: GaussianProcess, rows: Array, *, seed: int = 0) -> Array:
    """Return joint samples of the regrets at n rows from the posterior (`SAMPLES` x n).

    They have no noise, which is right for comparing settings, and wrong for the interval of what a
    trial will measure (`regret_quantiles`).
    """
    mean, covariance = process.predict(rows)
    root = _square_root(covariance)
    random = np.random.default_rng(seed)
    regrets = prior_mean(rows) + mean + random.standard_normal((SAMPLES, len(rows))) @ root.T
    clipped: Array = np.clip(regrets, 0.0, 1.0)
    return clipped


def regret_quantiles(process: GaussianProcess, rows: Array, shares: Sequence[float]) -> Array:
    """Return quantiles of what a new trial would measure at n rows (shares x n).

    To the variance of the regrets is added that of the noise, and that of the factor that `_SCALE`
    is the deviation of.
    """
    mean, covariance = process.predict(rows)
    expected = np.clip(prior_mean(rows) + mean, 0.0, 1.0)
    noise = (1.0 + 1.0 / SMALL_GROUP) * process.parameters["noise"] ** 2
    deviation = np.sqrt(covariance.diagonal() + noise + (_SCALE * expected) ** 2)
    z = np.array([[NormalDist().inv_cdf(share)] for share in shares])
    found: Array = np.clip(prior_mean(rows) + mean + z * deviation, 0.0, 1.0)
    return found


def _square_root(covariance: Array) -> Array:
    """Return a matrix whose product with its transpose is `covariance`."""
    symmetric = (covariance + covariance.T) / 2
    try:
        return np.asarray(np.linalg.cholesky(symmetric + 1e-9 * np.eye(len(symmetric))))
    except np.linalg.LinAlgError:  # rounding has made it indefinite; this takes ten times as long
        values, vectors = np.linalg.eigh(symmetric)
        return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))


def choose_complementary(
    regrets: Array,
    k: int,
    cost: Array | None = None,
    past: Array | None = None,
    *,
    relative: bool = True,
) -> list[int]:
    """Choose k rows greedily so that the expected minimum of their regrets is smallest.

    Each next row covers for the cases in which those before it go wrong, rather than repeat them.
    `regrets` are samples (samples x rows); `cost` (rows) is added to them. `past` are the regrets
    in other scenarios (scenarios x rows): a new one is rarely between two of them, as samples are,
    but much like one or the other, so that rows after the first cover for those. So does the first
    where no `relative` of the scenario's model was seen. Returns indices of rows.
    """
    chosen: list[int] = []
    paid = regrets if cost is None else regrets + cost
    cases = [(paid, np.ones((len(regrets), 1)), 1.0)]
    if past is not None and len(past):
        cases = [(paid, cases[0][1], 1.0 - _PAST_SHARE)]
        cases.append((past if cost is None else past + cost, np.ones((len(past), 1)), _PAST_SHARE))
    for number in range(min(k, regrets.shape[1])):
        # Of two that cover the same, the better one.
        gain = 1e-6 * paid.mean(axis=0)
        for sampled, left, share in cases if number or not relative else cases[:1]:
            gain += share * np.minimum(sampled, left).mean(axis=0)
        gain[chosen] = np.inf
        chosen.append(int(gain.argmin()))
        last = chosen[-1]
        cases = [
            (sampled, np.minimum(left, sampled[:, [last]]), share) for sampled, left, share in cases
        ]
    return chosen


def _by_relatedness(
    groups: Mapping[float, ScenarioTrials],
    scenario: Mapping[str, float],
    parameters: Hyperparameters,
) -> list[float]:
    """Return the codes of the scenarios, the most related first."""
    if not groups:
        return []
    here = np.array([scenario.get(name, np.nan) for name in COLUMNS.names])
    rows = np.array([group.rows[0] for group in groups.values()])
    order = np.argsort(-relatedness(COLUMNS, parameters, here, rows), kind="stable")
    codes = list(groups)
    return [codes[index] for index in order]
