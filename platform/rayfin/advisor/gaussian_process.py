"""A Gaussian process over trials: the regret of any setting in any scenario, with its variance.

How much each term of the kernel counts, and how far apart two settings are, are learned from the
trials (Rasmussen & Williams 2006, chapter 5: maximum a posteriori, with log-normal priors), but no
term is learned to count for less than expected (`fit` says why). All of it is numpy: a
recommendation must not wait for torch to be imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from rayfin.advisor.kernel import Array, Columns, Hyperparameters, Kernel

_JITTER = 1e-6
_STEPS = 60
"""The number of steps of `rprop`."""
_DEVIATIONS = (1.5, 0.7)
"""The standard deviations of the log-normal priors, of amplitudes and of the others: a factor of
about five, and of about two."""


@dataclass(frozen=True)
class Observations:
    """What was observed at n rows, and how precise each observation is."""

    rows: Array
    """The rows (n x columns)."""
    values: Array
    """The observed values less the mean function (n), as the process has mean 0."""
    noise: Array
    """The noise variance of each observation (n), as a multiple of the learned one."""
    offsets: Array
    """The variance of the offset of each one's group (n), as a multiple of the learned one."""

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def none(cls, columns: Columns) -> Self:
        """Return no observations."""
        nothing = np.zeros(0)
        return cls(np.zeros((0, len(columns.names))), nothing, nothing, nothing)

    def pairs(self) -> Array:
        """Return the geometric mean of the offsets' multiples for each pair (n x n)."""
        root = np.sqrt(self.offsets)
        return np.outer(root, root)


@dataclass(frozen=True)
class GaussianProcess:
    """A Gaussian process conditioned on observations."""

    columns: Columns
    parameters: Hyperparameters
    observations: Observations
    _cache: dict[str, Array] = field(default_factory=dict, repr=False, compare=False)

    def predict(self, rows: Array) -> tuple[Array, Array]:
        """Return the posterior mean (m) and covariance (m x m) at m rows, without observation
        noise.

        The offset of a group that was not observed is left out, too, as its level does not matter.
        """
        prior = Kernel(self.columns, rows, rows).value(self.parameters, 0.0)
        observed = self.observations
        if not len(observed):
            return np.zeros(len(rows)), prior
        inverse, cross = self._inverse(), self._cross(rows)
        (group,) = self.columns.indices((self.columns.group,))
        groups, codes = rows[:, group], observed.rows[:, group]
        for code in np.intersect1d(groups, codes):
            level = self.parameters["offset"] ** 2 * observed.offsets[codes == code][0]
            prior += level * np.outer(groups == code, groups == code)
        return cross @ (inverse @ observed.values), prior - cross @ inverse @ cross.T

    def posterior_mean(self, values: Array, rows: Array) -> Array:
        """Return the posterior mean (m) of a quantity that was `values` at the observed rows."""
        mean: Array = self.weights(rows) @ values
        return mean

    def weights(self, rows: Array) -> Array:
        """Return by how much each of n observations moves the posterior mean of m rows (m x n).

        The mean is this matrix times the observed values (Rasmussen & Williams 2006, section 2.6).
        """
        if not len(self.observations):
            return np.zeros((len(rows), 0))
        found: Array = self._cross(rows) @ self._inverse()
        return found

    def similarity(self, rows: Array) -> Array:
        """Return the prior correlation of each of m rows with each of n observations (m x n)."""
        observed = self.observations
        kernel = Kernel(self.columns, rows, observed.rows).value(self.parameters, 0.0)
        most: Array = Kernel(self.columns, rows[:1], rows[:1]).value(self.parameters, 0.0)
        similarity: Array = kernel / most[0, 0]
        return similarity

    def _cross(self, rows: Array) -> Array:
        observed = self.observations
        return Kernel(self.columns, rows, observed.rows).value(
            self.parameters, observed.offsets[None]
        )

    def log_marginal_likelihood(self) -> float:
        """Return the logarithm of the observations' marginal likelihood."""
        observed = self.observations
        covariance = self._covariance()
        _, determinant = np.linalg.slogdet(covariance)
        fit = observed.values @ np.linalg.solve(covariance, observed.values)
        return float(-0.5 * (fit + determinant + len(observed) * np.log(2 * np.pi)))

    def _covariance(self) -> Array:
        observed = self.observations
        kernel = Kernel(self.columns, observed.rows, observed.rows).value(
            self.parameters, observed.pairs()
        )
        kernel += np.diag(self.parameters["noise"] ** 2 * observed.noise + _JITTER)
        return kernel

    def _inverse(self) -> Array:
        if not self._cache:
            self._cache["inverse"] = np.asarray(np.linalg.inv(self._covariance()), np.float64)
        return self._cache["inverse"]


def relatedness(columns: Columns, parameters: Hyperparameters, row: Array, rows: Array) -> Array:
    """Return how much the scenarios of m rows say about that of `row` (m): the sum of the terms."""
    terms = Kernel(columns, row[None], rows).scenario_terms(parameters).values()
    return np.asarray(sum(terms, np.zeros((1, len(rows))))[0])


def fit(
    columns: Columns, observed: Observations, start: Hyperparameters | None = None
) -> Hyperparameters:
    """Return the hyperparameters with the maximum a posteriori probability, given observations.

    Amplitudes are at least those of the priors. For the scenario's terms (size, data, brand, ...)
    that keeps what was observed in one scenario from being taken for what happens in another: a
    history of two models can't tell whether their size matters. The amplitude of `common` must keep
    up with them, or nothing would be left for it to explain, as if no scenario told anything about
    another. The time grows with the cube of the observations: about 3 s for 500 on two cores.
    """
    expected = Hyperparameters.expected(columns)
    names = list(expected.values)
    prior = np.array([expected.values[name] for name in names])
    kernel = Kernel(columns, observed.rows, observed.rows)
    pairs = observed.pairs()
    amplitude = np.array([name.startswith("amplitude.") for name in names])
    deviation = np.where(amplitude, *_DEVIATIONS)

    def loss(point: Array) -> tuple[float, Array]:
        parameters = Hyperparameters(dict(zip(names, point.tolist(), strict=True)))
        noise = parameters["noise"] ** 2 * observed.noise
        covariance = kernel.value(parameters, pairs) + np.diag(noise + _JITTER)
        try:
            half = np.linalg.inv(np.linalg.cholesky(covariance))
        except np.linalg.LinAlgError:
            return np.inf, np.zeros_like(point)
        inverse = half.T @ half
        weights = inverse @ observed.values
        weight = 0.5 * (inverse - np.outer(weights, weights))
        found = kernel.gradients(parameters, weight, pairs)
        found["noise"] = 2 * float(weight.diagonal() @ noise)
        away = (point - prior) / deviation
        value = 0.5 * observed.values @ weights - np.log(half.diagonal()).sum() + 0.5 * away @ away
        # A column that never varies leaves its length scale to the prior.
        return float(value), np.array([found.get(n, 0.0) for n in names]) + away / deviation

    floor = np.where(amplitude, prior, -np.inf)
    begin = expected if start is None else start
    point = np.array([begin.values.get(name, expected.values[name]) for name in names])
    return Hyperparameters(dict(zip(names, rprop(loss, point, floor).tolist(), strict=True)))


def rprop(loss: Callable[[Array], tuple[float, Array]], start: Array, floor: Array) -> Array:
    """Minimise a function within lower bounds by iRprop- (Igel & Huesken 2000).

    Each coordinate moves by a step of its own, whose size follows the signs of the gradient. `loss`
    returns a value and its gradient; infinity marks an infeasible point. Returns the best of
    `_STEPS` points, none of whose coordinates is below `floor`.
    """
    point = np.maximum(start, floor)
    steps = np.full_like(point, 0.1)
    before = np.zeros_like(point)
    best, least = point, np.inf
    for _ in range(_STEPS):
        value, gradient = loss(point)
        if value < least:
            best, least = point, value
        turned = gradient * before
        steps = np.clip(
            steps * np.where(turned > 0, 1.2, np.where(turned < 0, 0.5, 1.0)), 1e-4, 0.5
        )
        gradient = np.where(turned < 0, 0.0, gradient)
        before = gradient
        point = np.maximum(point - np.sign(gradient) * steps, floor)
    return best
