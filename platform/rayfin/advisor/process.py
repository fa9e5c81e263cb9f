"""A Gaussian process over trials: what any setting would do in any scenario, and how sure that is.

A trial is a row of numbers (`Columns` says which are its setting, its model, its data). Two trials
are alike as far as their settings are, and their scenarios:

    k = common(x, x') + own(x, x') * [size + brand + generation + data + task + group] + offset

- `common` is what a setting does everywhere, so that a new scenario starts from all of them.
- Each term of the sum is what it does more or less in scenarios that are alike in that one respect;
  `group` is what is particular to one scenario (a model on a task), and is learned there only.
- `offset` is a constant of each group: the level of its scores says nothing about its settings.

How much each term counts, and how far apart two settings are, are learned from the trials
(Rasmussen & Williams 2006, chapter 5: maximum a posteriori, with log-normal priors), where no term
is learned to count for less than expected (`fit` says why). All of it is numpy: a recommendation
must not wait for torch to be imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from rayfin.advisor.rprop import rprop

Array = NDArray[np.float64]

_JITTER = 1e-6
_SQRT5 = 5**0.5
MISSING = 0.05
"""Squared distance between an unknown value and the column's usual one, in units of the column's
expected length scale: little, as other people's tables leave many columns out."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a trial's row, in their order, and how far apart counts as far."""

    setting: Mapping[str, float]
    """Column -> length scale expected of it, in the column's own unit."""
    scenario: Mapping[str, Mapping[str, float]]
    """Term -> its columns, as above."""
    same: tuple[str, ...]
    """Terms that ask only whether one code (a column of that name) is equal."""
    amplitudes: Mapping[str, float]
    """Term -> what is expected of it: how far scenarios differ that differ in it alone."""
    common: float
    """What is expected of `common`."""
    group: str
    """The one of `same` whose trials share an offset."""
    usual: Mapping[str, float] = field(default_factory=dict)
    """Column -> the value beside which an unknown one lies; 0 for those left out."""

    @property
    def names(self) -> tuple[str, ...]:
        terms = [name for columns in self.scenario.values() for name in columns]
        return (*self.setting, *terms, *self.same)

    @property
    def terms(self) -> tuple[str, ...]:
        return (*self.scenario, *self.same)

    def indices(self, names: Mapping[str, float] | tuple[str, ...]) -> list[int]:
        every = self.names
        return [every.index(name) for name in names]


@dataclass(frozen=True)
class Parameters:
    """The process' own parameters, as logarithms: name -> value."""

    values: Mapping[str, float]

    @classmethod
    def expected(cls, columns: Columns) -> Parameters:
        """Those of the priors: what is assumed before any trial."""
        scales = {f"common.{n}": np.log(s) for n, s in columns.setting.items()}
        scales |= {f"own.{n}": np.log(s) for n, s in columns.setting.items()}
        for term, names in columns.scenario.items():
            scales |= {f"{term}.{n}": np.log(s) for n, s in names.items()}
        amplitudes = {f"amplitude.{term}": columns.amplitudes[term] for term in columns.terms}
        rest = amplitudes | {"amplitude.common": columns.common, "offset": 0.2, "noise": 0.05}
        return cls(
            {k: float(v) for k, v in (scales | {k: np.log(v) for k, v in rest.items()}).items()}
        )

    def __getitem__(self, name: str) -> float:
        return float(np.exp(self.values[name]))


_DEVIATIONS = (1.5, 0.7)
"""Standard deviations of the priors' logarithms: amplitudes lie within a factor of five or so,
others within two."""


def _squares(one: Array, other: Array, usual: Array, missing: Array) -> Array:
    """Squared differences of each pair, a column at a time; `missing`: those of unknown values.

    Unknown values lie beside the usual one, in a dimension of their own: were they as far from all
    known ones, whatever these are, the kernel would not be positive definite.
    """
    unknown = np.isnan(one)[:, None] != np.isnan(other)[None]
    here, there = (np.where(np.isnan(rows), usual, rows) for rows in (one, other))
    return np.asarray((here[:, None] - there[None]) ** 2 + missing * unknown)


class _Kernel:
    """The parts of k between two sets of rows, kept for the gradients.

    Columns in which no two rows differ are left out: most histories vary a few of them.
    """

    def __init__(self, columns: Columns, one: Array, other: Array) -> None:
        self.columns = columns

        def varying(names: Mapping[str, float]) -> tuple[list[str], Array]:
            both = np.concatenate([one, other])
            kept = [
                (name, place)
                for name, place in zip(names, columns.indices(names), strict=True)
                if len(np.unique(both[:, place], equal_nan=True)) > 1
            ]
            places = [place for _, place in kept]
            usual = np.array([columns.usual.get(name, 0.0) for name, _ in kept])
            missing = np.array([MISSING * names[name] ** 2 for name, _ in kept])
            squares = _squares(one[:, places], other[:, places], usual, missing)
            return [name for name, _ in kept], squares

        self.setting = varying(columns.setting)
        self.scenario = {term: varying(names) for term, names in columns.scenario.items()}
        self.same = {
            name: (one[:, None, place] == other[None, :, place]).astype(float)
            for name in columns.same
            for place in columns.indices((name,))
        }

    def matern(self, parameters: Parameters, part: str) -> tuple[Array, Array]:
        """Matern 5/2 over the settings, and what its derivatives by log length scales share."""
        d = _SQRT5 * np.sqrt(self._distance(parameters, part, self.setting))
        decay = np.exp(-d)
        return (1.0 + d + d * d / 3.0) * decay, 5.0 / 3.0 * (1.0 + d) * decay

    def gaussian(self, parameters: Parameters, term: str) -> Array:
        kernel: Array = np.exp(-0.5 * self._distance(parameters, term, self.scenario[term]))
        return kernel

    def _distance(
        self, parameters: Parameters, part: str, varying: tuple[list[str], Array]
    ) -> Array:
        names, squares = varying
        scaled: Array = squares @ np.array([parameters[f"{part}.{name}"] ** -2 for name in names])
        return scaled

    def alike(self, parameters: Parameters) -> dict[str, Array]:
        """Term -> its share of the sum, amplitude included."""
        parts = {term: self.gaussian(parameters, term) for term in self.columns.scenario}
        return {
            term: parameters[f"amplitude.{term}"] ** 2 * part
            for term, part in (parts | self.same).items()
        }

    def value(self, parameters: Parameters, offsets: Array | float = 1.0) -> Array:
        """k, all of it; `offsets` scale the offset's variance for each pair."""
        common, _ = self.matern(parameters, "common")
        own, _ = self.matern(parameters, "own")
        alike = sum(self.alike(parameters).values(), np.zeros_like(own))
        offset = parameters["offset"] ** 2 * offsets * self.same[self.columns.group]
        value: Array = parameters["amplitude.common"] ** 2 * common + own * alike + offset
        return value

    def gradients(self, parameters: Parameters, weight: Array, offsets: Array) -> dict[str, float]:
        """For each parameter the sum of `weight` times k's derivative by it."""
        common, common_slope = self.matern(parameters, "common")
        own, own_slope = self.matern(parameters, "own")
        alike = self.alike(parameters)
        total = sum(alike.values(), np.zeros_like(own))
        amplitude = parameters["amplitude.common"] ** 2
        found = {"amplitude.common": 2 * amplitude * float((weight * common).sum())}

        def pull(part: str, share: Array, varying: tuple[list[str], Array]) -> None:
            names, squares = varying
            pulled = np.tensordot(share, squares, axes=([0, 1], [0, 1]))
            for name, strength in zip(names, pulled, strict=True):
                found[f"{part}.{name}"] = float(strength) / parameters[f"{part}.{name}"] ** 2

        pull("common", weight * amplitude * common_slope, self.setting)
        pull("own", weight * total * own_slope, self.setting)
        for term, part in alike.items():
            share = weight * own * part
            found[f"amplitude.{term}"] = 2 * float(share.sum())
            if term in self.scenario:
                pull(term, share, self.scenario[term])
        offset = parameters["offset"] ** 2 * offsets * self.same[self.columns.group]
        found["offset"] = 2 * float((weight * offset).sum())
        return found


@dataclass(frozen=True)
class Observations:
    """Rows (n x columns), what was seen there (n), and how much each is worth."""

    rows: Array
    values: Array
    """Less what was expected (the mean function): the process itself has mean 0."""
    noise: Array
    """Variance of each beside the learned noise, in units of that noise's variance: 1 is plain."""
    offsets: Array
    """Of each one's group: how uncertain its offset is, relative to the learned: 1 is plain."""

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def none(cls, columns: Columns) -> Self:
        nothing = np.zeros(0)
        return cls(np.zeros((0, len(columns.names))), nothing, nothing, nothing)

    def pairs(self) -> Array:
        root = np.sqrt(self.offsets)
        return np.outer(root, root)


@dataclass(frozen=True)
class Process:
    """A Gaussian process that has seen `observations`."""

    columns: Columns
    parameters: Parameters
    observations: Observations
    _cache: dict[str, Array] = field(default_factory=dict, repr=False, compare=False)

    def predict(self, rows: Array) -> tuple[Array, Array]:
        """Means (m) and covariance (m x m) at `rows`, the noise of a measurement left out.

        Of a group that was not observed, its offset is left out too: nothing is asked about levels.
        """
        here = _Kernel(self.columns, rows, rows).value(self.parameters, 0.0)
        seen = self.observations
        if not len(seen):
            return np.zeros(len(rows)), here
        inverse, cross = self._inverse(), self._cross(rows)
        (group,) = self.columns.indices((self.columns.group,))
        groups, codes = rows[:, group], seen.rows[:, group]
        for code in np.intersect1d(groups, codes):
            level = self.parameters["offset"] ** 2 * seen.offsets[codes == code][0]
            here += level * np.outer(groups == code, groups == code)
        return cross @ (inverse @ seen.values), here - cross @ inverse @ cross.T

    def mean_of(self, values: Array, rows: Array) -> Array:
        """The mean at `rows` of another quantity, of which `values` were seen at those places."""
        seen = self.observations
        if not len(seen):
            return np.zeros(len(rows))
        mean: Array = self._cross(rows) @ (self._inverse() @ values)
        return mean

    def likeness(self, rows: Array) -> Array:
        """How much alike each of `rows` (m) and each observation (n) are: m x n, at most 1."""
        seen = self.observations
        kernel = _Kernel(self.columns, rows, seen.rows).value(self.parameters, 0.0)
        most: Array = _Kernel(self.columns, rows[:1], rows[:1]).value(self.parameters, 0.0)
        likeness: Array = kernel / most[0, 0]
        return likeness

    def _cross(self, rows: Array) -> Array:
        seen = self.observations
        return _Kernel(self.columns, rows, seen.rows).value(self.parameters, seen.offsets[None])

    def evidence(self) -> float:
        """Logarithm of the marginal likelihood of what was seen."""
        seen = self.observations
        covariance = self._covariance()
        _, determinant = np.linalg.slogdet(covariance)
        fit = seen.values @ np.linalg.solve(covariance, seen.values)
        return float(-0.5 * (fit + determinant + len(seen) * np.log(2 * np.pi)))

    def _covariance(self) -> Array:
        seen = self.observations
        kernel = _Kernel(self.columns, seen.rows, seen.rows).value(self.parameters, seen.pairs())
        kernel += np.diag(self.parameters["noise"] ** 2 * seen.noise + _JITTER)
        return kernel

    def _inverse(self) -> Array:
        if not self._cache:
            self._cache["inverse"] = np.asarray(np.linalg.inv(self._covariance()), np.float64)
        return self._cache["inverse"]


def kinship(columns: Columns, parameters: Parameters, row: Array, rows: Array) -> Array:
    """How much what is learned in the scenarios of `rows` (m) says about that of `row`: m."""
    terms = _Kernel(columns, row[None], rows).alike(parameters).values()
    return np.asarray(sum(terms, np.zeros((1, len(rows))))[0])


def fit(columns: Columns, seen: Observations, start: Parameters | None = None) -> Parameters:
    """The parameters under which `seen` is most likely, and which the priors allow.

    Amplitudes are those of the priors at least. Those of the scenario's terms (size, data, brand,
    ...), so that what was seen in one scenario never passes for what another one does: a history
    of two models can't tell whether their size matters. And that of `common` beside them, which
    would else be left nothing to explain, as if no scenario told anything about another.
    Time grows with the cube of the observations: about 3 s for 500 on two cores.
    """
    expected = Parameters.expected(columns)
    names = list(expected.values)
    prior = np.array([expected.values[name] for name in names])
    kernel = _Kernel(columns, seen.rows, seen.rows)
    pairs = seen.pairs()
    amplitude = np.array([name.startswith("amplitude.") for name in names])
    deviation = np.where(amplitude, *_DEVIATIONS)

    def loss(point: Array) -> tuple[float, Array]:
        parameters = Parameters(dict(zip(names, point.tolist(), strict=True)))
        noise = parameters["noise"] ** 2 * seen.noise
        covariance = kernel.value(parameters, pairs) + np.diag(noise + _JITTER)
        try:
            half = np.linalg.inv(np.linalg.cholesky(covariance))
        except np.linalg.LinAlgError:
            return np.inf, np.zeros_like(point)
        inverse = half.T @ half
        weights = inverse @ seen.values
        weight = 0.5 * (inverse - np.outer(weights, weights))
        found = kernel.gradients(parameters, weight, pairs)
        found["noise"] = 2 * float(weight.diagonal() @ noise)
        away = (point - prior) / deviation
        value = 0.5 * seen.values @ weights - np.log(half.diagonal()).sum() + 0.5 * away @ away
        # A column that never varies leaves its length scale to the prior.
        return float(value), np.array([found.get(n, 0.0) for n in names]) + away / deviation

    floor = np.where(amplitude, prior, -np.inf)
    begin = expected if start is None else start
    point = np.array([begin.values.get(name, expected.values[name]) for name in names])
    return Parameters(dict(zip(names, rprop(loss, point, floor).tolist(), strict=True)))
