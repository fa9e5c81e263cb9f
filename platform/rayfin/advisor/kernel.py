"""The covariance function of the advisor's Gaussian process, and its hyperparameters.

A trial is a row of numbers; `Columns` says which of them are its setting, its model and its data.
The covariance of two trials is

    k = common(x, x') + own(x, x') * [size + brand + generation + data + task + group] + offset

- `common` (Matern 5/2 over the setting) is what a setting does in every scenario, so that a new
  scenario starts from all of them.
- `own` (Matern 5/2 over the setting, too) times each term of the sum is what a setting does more or
  less in scenarios that agree in that one respect; `group` is what is particular to one scenario (a
  model on a data set), and is learned there only.
- `offset` is a constant of each group: the level of its scores says nothing about its settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_SQRT5 = 5**0.5
MISSING_DISTANCE = 0.05
"""The squared distance between an unknown value and the column's default, in units of the column's
expected length scale; it is small, as other people's tables leave many columns out."""


@dataclass(frozen=True)
class Columns:
    """The columns of a trial's row, in order, with their expected length scales and amplitudes."""

    setting: Mapping[str, float]
    """The expected length scale of each column of the setting, in the column's own unit."""
    scenario: Mapping[str, Mapping[str, float]]
    """The columns of each numeric term of the scenario, with their expected length scales."""
    categorical: tuple[str, ...]
    """The terms with one column of the same name, which holds a code that is equal or not."""
    amplitudes: Mapping[str, float]
    """The expected amplitude of each term: by how much scenarios differ that differ in it alone."""
    common: float
    """The expected amplitude of `common`."""
    group: str
    """The categorical term whose trials share an offset."""
    defaults: Mapping[str, float] = field(default_factory=dict)
    """The value beside which a column's unknown values lie; 0 where none is given."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all columns, in the order of a row."""
        terms = [name for columns in self.scenario.values() for name in columns]
        return (*self.setting, *terms, *self.categorical)

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of all terms of the scenario."""
        return (*self.scenario, *self.categorical)

    def indices(self, names: Mapping[str, float] | tuple[str, ...]) -> list[int]:
        """Return the indices of columns in a row."""
        every = self.names
        return [every.index(name) for name in names]


@dataclass(frozen=True)
class Hyperparameters:
    """The kernel's hyperparameters as natural logarithms; indexing returns the value itself."""

    values: Mapping[str, float]

    @classmethod
    def expected(cls, columns: Columns) -> Hyperparameters:
        """Return the modes of the priors, which are assumed before any trial."""
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


def _squares(one: Array, other: Array, defaults: Array, missing: Array) -> Array:
    """Return the squared differences of all pairs of rows (n x m x columns).

    An unknown value lies beside the column's default, at the distance `missing` in a dimension of
    its own. Were it equally far from all known values, the kernel would not be positive definite.
    """
    unknown = np.isnan(one)[:, None] != np.isnan(other)[None]
    first, second = (np.where(np.isnan(rows), defaults, rows) for rows in (one, other))
    return np.asarray((first[:, None] - second[None]) ** 2 + missing * unknown)


class Kernel:
    """The covariances between two sets of rows (n and m), and their gradients.

    Columns in which no two rows differ are left out, as most histories vary only a few.
    """

    def __init__(self, columns: Columns, one: Array, other: Array) -> None:
        self.columns = columns

        def varying(names: Mapping[str, float]) -> tuple[list[str], Array]:
            both = np.concatenate([one, other])
            kept = [
                (name, index)
                for name, index in zip(names, columns.indices(names), strict=True)
                if len(np.unique(both[:, index], equal_nan=True)) > 1
            ]
            indices = [index for _, index in kept]
            defaults = np.array([columns.defaults.get(name, 0.0) for name, _ in kept])
            missing = np.array([MISSING_DISTANCE * names[name] ** 2 for name, _ in kept])
            squares = _squares(one[:, indices], other[:, indices], defaults, missing)
            return [name for name, _ in kept], squares

        self.setting = varying(columns.setting)
        self.scenario = {term: varying(names) for term, names in columns.scenario.items()}
        self.equal = {
            name: (one[:, None, index] == other[None, :, index]).astype(float)
            for name in columns.categorical
            for index in columns.indices((name,))
        }

    def matern(self, parameters: Hyperparameters, part: str) -> tuple[Array, Array]:
        """Return the Matern 5/2 kernel over settings, and the common factor of its derivatives.

        The derivatives are those by the logarithms of the length scales; both results are n x m.
        """
        d = _SQRT5 * np.sqrt(self._distance(parameters, part, self.setting))
        decay = np.exp(-d)
        return (1.0 + d + d * d / 3.0) * decay, 5.0 / 3.0 * (1.0 + d) * decay

    def gaussian(self, parameters: Hyperparameters, term: str) -> Array:
        """Return the squared exponential kernel over the columns of a term (n x m)."""
        kernel: Array = np.exp(-0.5 * self._distance(parameters, term, self.scenario[term]))
        return kernel

    def _distance(
        self, parameters: Hyperparameters, part: str, varying: tuple[list[str], Array]
    ) -> Array:
        names, squares = varying
        scaled: Array = squares @ np.array([parameters[f"{part}.{name}"] ** -2 for name in names])
        return scaled

    def scenario_terms(self, parameters: Hyperparameters) -> dict[str, Array]:
        """Return each term of the scenario (n x m), its amplitude included."""
        parts = {term: self.gaussian(parameters, term) for term in self.columns.scenario}
        return {
            term: parameters[f"amplitude.{term}"] ** 2 * part
            for term, part in (parts | self.equal).items()
        }

    def value(self, parameters: Hyperparameters, offsets: Array | float = 1.0) -> Array:
        """Return the covariances (n x m); `offsets` scales the offset's variance for each pair."""
        common, _ = self.matern(parameters, "common")
        own, _ = self.matern(parameters, "own")
        terms = sum(self.scenario_terms(parameters).values(), np.zeros_like(own))
        offset = parameters["offset"] ** 2 * offsets * self.equal[self.columns.group]
        value: Array = parameters["amplitude.common"] ** 2 * common + own * terms + offset
        return value

    def gradients(
        self, parameters: Hyperparameters, weight: Array, offsets: Array
    ) -> dict[str, float]:
        """Return the sum of `weight` (n x m) times dk by each log hyperparameter."""
        common, common_slope = self.matern(parameters, "common")
        own, own_slope = self.matern(parameters, "own")
        terms = self.scenario_terms(parameters)
        total = sum(terms.values(), np.zeros_like(own))
        amplitude = parameters["amplitude.common"] ** 2
        found = {"amplitude.common": 2 * amplitude * float((weight * common).sum())}

        def add_scales(part: str, share: Array, varying: tuple[list[str], Array]) -> None:
            names, squares = varying
            gradient = np.tensordot(share, squares, axes=([0, 1], [0, 1]))
            for name, slope in zip(names, gradient, strict=True):
                found[f"{part}.{name}"] = float(slope) / parameters[f"{part}.{name}"] ** 2

        add_scales("common", weight * amplitude * common_slope, self.setting)
        add_scales("own", weight * total * own_slope, self.setting)
        for term, part in terms.items():
            share = weight * own * part
            found[f"amplitude.{term}"] = 2 * float(share.sum())
            if term in self.scenario:
                add_scales(term, share, self.scenario[term])
        offset = parameters["offset"] ** 2 * offsets * self.equal[self.columns.group]
        found["offset"] = 2 * float((weight * offset).sum())
        return found
