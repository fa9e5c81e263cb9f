"""The Gaussian process: against the textbook's formulas, finite differences and known draws."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from rayfin.advisor import gaussian_process as module
from rayfin.advisor.gaussian_process import (
    GaussianProcess,
    Observations,
    fit,
    relatedness,
)
from rayfin.advisor.kernel import MISSING_DISTANCE, Array, Columns, Hyperparameters, Kernel

COLUMNS = Columns(
    setting={"rate": 0.7, "rank": 4.0},
    scenario={"size": {"parameters": 1.0, "width": 2.0}, "data": {"rows": 1.5}},
    categorical=("brand", "group"),
    amplitudes={"size": 0.15, "data": 0.2, "brand": 0.1, "group": 0.12},
    common=0.3,
    group="group",
    defaults={"rank": 4.0, "parameters": 9.0},
)
NAMES = COLUMNS.names


def rows(count: int, *, seed: int = 0, groups: int = 3, unknown: float = 0.0) -> Array:
    """Trials of several groups, each in a scenario of its own, with some unknown values."""
    random = np.random.default_rng(seed)
    found = np.empty((count, len(NAMES)))
    group = random.integers(groups, size=count)
    scenarios = random.normal((9.0, 0.0, 3.0), size=(groups, 3))
    found[:, 0] = random.normal(size=count)
    found[:, 1] = random.integers(1, 7, size=count)
    found[:, 2:5] = scenarios[group]
    found[:, 5] = group // 2
    found[:, 6] = 100.0 + group
    values = found[:, :5]
    values[random.random(values.shape) < unknown] = np.nan
    return found


def observations(seen: Array, values: Array, *, seed: int = 1) -> Observations:
    """Each worth something else; offsets are alike within a group, as the table makes them."""
    random = np.random.default_rng(seed)
    noise = 1.0 + random.random(len(seen))
    return Observations(seen, values, noise, 1.0 + (seen[:, 6] - 100.0) / 2)


def parameters(*, seed: int = 2) -> Hyperparameters:
    expected = Hyperparameters.expected(COLUMNS).values
    away = np.random.default_rng(seed).normal(scale=0.3, size=len(expected))
    return Hyperparameters(
        {name: value + move for (name, value), move in zip(expected.items(), away, strict=True)}
    )


def aside(name: str) -> float:
    """How far an unknown value lies beside the usual one."""
    scales = dict(COLUMNS.setting)
    for columns in COLUMNS.scenario.values():
        scales |= columns
    return float(MISSING_DISTANCE**0.5 * scales[name])


def point(row: Array, name: str) -> tuple[float, float]:
    """A column as two coordinates: the value, and whether it is unknown."""
    value = float(row[NAMES.index(name)])
    if math.isnan(value):
        return COLUMNS.defaults.get(name, 0.0), aside(name)
    return value, 0.0


def distance(one: Array, other: Array, scales: dict[str, float]) -> float:
    """Squared, each column in units of its scale."""
    return sum(
        ((a - b) / scale) ** 2
        for name, scale in scales.items()
        for a, b in zip(point(one, name), point(other, name), strict=True)
    )


def textbook(one: Array, other: Array, p: Hyperparameters, offset: float) -> float:
    """The kernel of the module's docstring for two rows, written out (R&W, equations 4.9, 4.17)."""

    def matern(part: str) -> float:
        d = math.sqrt(5 * distance(one, other, {n: p[f"{part}.{n}"] for n in COLUMNS.setting}))
        return (1 + d + d**2 / 3) * math.exp(-d)

    terms = 0.0
    for term, columns in COLUMNS.scenario.items():
        square = distance(one, other, {n: p[f"{term}.{n}"] for n in columns})
        terms += p[f"amplitude.{term}"] ** 2 * math.exp(-square / 2)
    for term in COLUMNS.categorical:
        place = NAMES.index(term)
        terms += p[f"amplitude.{term}"] ** 2 * (one[place] == other[place])
    level = p["offset"] ** 2 * offset * (one[-1] == other[-1])
    return float(p["amplitude.common"] ** 2 * matern("common") + matern("own") * terms + level)


def matrix(ones: Array, others: Array, p: Hyperparameters, offsets: Any) -> Array:
    """`offsets(i, j)` scales the variance of what rows of a group share."""
    return np.array(
        [
            [textbook(a, b, p, offsets(i, j)) for j, b in enumerate(others)]
            for i, a in enumerate(ones)
        ]
    )


# --- the kernel and predictions -----------------------------------------------------------------


@pytest.mark.parametrize("unknown", [0.0, 0.3])
def test_predictions_are_the_textbooks(unknown: float) -> None:
    p = parameters()
    every = rows(20, unknown=unknown)
    seen, asked = every[:14], every[14:].copy()
    asked[-1, 6] = 999.0  # of a group that was never seen
    values = np.random.default_rng(3).normal(size=len(seen))
    given = observations(seen, values)
    offset = dict(zip(seen[:, 6].tolist(), given.offsets.tolist(), strict=True))

    noise = p["noise"] ** 2 * given.noise + module._JITTER
    covariance = matrix(seen, seen, p, lambda i, _: given.offsets[i]) + np.diag(noise)
    cross = matrix(asked, seen, p, lambda _, j: given.offsets[j])
    here = matrix(asked, asked, p, lambda i, _: offset.get(asked[i, 6], 0.0))
    mean = cross @ np.linalg.solve(covariance, values)
    spread = here - cross @ np.linalg.solve(covariance, cross.T)

    found = GaussianProcess(COLUMNS, p, given)
    predicted, covariance_found = found.predict(asked)
    assert predicted == pytest.approx(mean, abs=1e-9)
    assert covariance_found == pytest.approx(spread, abs=1e-9)
    other = np.random.default_rng(4).normal(size=len(seen))
    assert found.posterior_mean(other, asked) == pytest.approx(
        cross @ np.linalg.solve(covariance, other), abs=1e-9
    )
    n = len(seen)
    expected = -0.5 * (
        values @ np.linalg.solve(covariance, values)
        + math.log(np.linalg.det(covariance))
        + n * math.log(2 * math.pi)
    )
    assert found.log_marginal_likelihood() == pytest.approx(expected)


def test_nothing_seen_is_the_prior() -> None:
    p, asked = parameters(), rows(5)
    found = GaussianProcess(COLUMNS, p, Observations.none(COLUMNS))
    mean, covariance = found.predict(asked)
    assert not mean.any()
    assert covariance == pytest.approx(matrix(asked, asked, p, lambda *_: 0.0))
    assert not found.posterior_mean(np.zeros(0), asked).any()
    assert found.similarity(asked).shape == (5, 0)
    assert found.log_marginal_likelihood() == 0.0


def test_what_was_seen_without_noise_is_predicted() -> None:
    p = Hyperparameters(dict(parameters().values) | {"noise": math.log(1e-3)})
    seen = rows(12)
    values = np.random.default_rng(3).normal(scale=0.2, size=12)
    mean, covariance = GaussianProcess(COLUMNS, p, observations(seen, values)).predict(seen)
    assert mean == pytest.approx(values, abs=0.01)
    assert (covariance.diagonal() < 1e-4).all()


# --- unknown values -----------------------------------------------------------------------------


def pair(**columns: tuple[float, float]) -> tuple[Array, Array]:
    one, other = np.zeros(len(NAMES)), np.zeros(len(NAMES))
    for name, values in columns.items():
        one[NAMES.index(name)], other[NAMES.index(name)] = values
    return one, other


def kernel(one: Array, other: Array) -> float:
    p = Hyperparameters.expected(COLUMNS)
    return float(Kernel(COLUMNS, one[None], other[None]).value(p, 0.0)[0, 0])


def test_an_unknown_value_lies_beside_the_usual_one() -> None:
    same = kernel(*pair(rank=(4.0, 4.0)))
    beside = kernel(*pair(rank=(math.nan, 4.0)))
    apart = kernel(*pair(rank=(4.0, 4.0 + aside("rank"))))
    assert beside == pytest.approx(apart)
    assert beside < same
    assert kernel(*pair(rank=(math.nan, 9.0))) < beside
    assert kernel(*pair(rank=(math.nan, math.nan))) == pytest.approx(same)


def test_unknown_values_leave_the_kernel_positive_definite() -> None:
    # Known values far from each other, and unknown ones that must not be near to all of them.
    ranks = [-20.0, -10.0, 0.0, 10.0, 20.0, math.nan]
    seen = np.zeros((36, len(NAMES)))
    seen[:, :2] = list(itertools.product(ranks, ranks))
    value = Kernel(COLUMNS, seen, seen).value(Hyperparameters.expected(COLUMNS))
    assert np.linalg.eigvalsh(value).min() > -1e-9


# --- offsets ------------------------------------------------------------------------------------


def test_the_level_of_other_groups_scores_says_nothing() -> None:
    p = Hyperparameters(
        dict(Hyperparameters.expected(COLUMNS).values) | {"offset": math.log(100.0)}
    )
    seen, asked = rows(30), rows(6, seed=9)
    asked[:, 6] = 999.0
    values = np.random.default_rng(3).normal(size=30)
    moved = values + np.where(seen[:, 6] == 100.0, 5.0, 0.0)
    one, other = (
        GaussianProcess(COLUMNS, p, observations(seen, v)).predict(asked)[0]
        for v in (values, moved)
    )
    assert other == pytest.approx(one, abs=0.02)


def test_the_level_of_the_own_group_moves_its_predictions() -> None:
    p = Hyperparameters(
        dict(Hyperparameters.expected(COLUMNS).values) | {"offset": math.log(100.0)}
    )
    seen, asked = rows(30), rows(6, seed=9)
    asked[:, 6] = 100.0
    values = np.random.default_rng(3).normal(size=30)
    moved = values + np.where(seen[:, 6] == 100.0, 5.0, 0.0)
    one, other = (
        GaussianProcess(COLUMNS, p, observations(seen, v)).predict(asked)[0]
        for v in (values, moved)
    )
    assert other == pytest.approx(one + 5.0, abs=0.05)


# --- similarity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("unknown", [0.0, 0.5])
def test_similarity_is_one_for_the_same_trial_and_never_more(unknown: float) -> None:
    seen = rows(25, unknown=unknown)
    found = GaussianProcess(COLUMNS, parameters(), observations(seen, np.zeros(25))).similarity(
        seen
    )
    assert found.diagonal() == pytest.approx(np.ones(25))
    assert found.max() <= 1.0 + 1e-12
    assert found.min() >= 0.0


def test_relatedness_is_what_the_scenarios_share() -> None:
    p, some = parameters(), rows(8, unknown=0.2)
    found = relatedness(COLUMNS, p, some[0], some)
    assert found.argmax() == 0
    same_setting = some.copy()
    same_setting[:, :2] = some[0, :2]
    common = p["amplitude.common"] ** 2
    expected = [textbook(some[0], row, p, 0.0) - common for row in same_setting]
    assert found == pytest.approx(expected)


# --- learning the parameters --------------------------------------------------------------------


def loss_of(seen: Observations, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `fit` minimises, with its gradient."""
    kept: list[Any] = []

    def keep(loss: Any, start: Array, _: Array) -> Array:
        kept.append(loss)
        return start

    with monkeypatch.context() as patch:
        patch.setattr(module, "rprop", keep)
        fit(COLUMNS, seen)
    return kept[0]


@pytest.mark.parametrize("unknown", [0.0, 0.25])
def test_gradients_are_those_of_finite_differences(
    unknown: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = rows(40, groups=5, unknown=unknown)
    values = np.random.default_rng(3).normal(scale=0.3, size=40)
    loss = loss_of(observations(seen, values), monkeypatch)
    p = parameters().values
    names, at = list(p), np.array(list(p.values()))
    gradient = loss(at)[1]
    step = 1e-5
    for place, name in enumerate(names):
        move = step * np.eye(len(at))[place]
        slope = (loss(at + move)[0] - loss(at - move)[0]) / (2 * step)
        assert gradient[place] == pytest.approx(slope, rel=1e-4, abs=1e-5), name
        assert gradient[place] != 0.0, name


def test_the_loss_is_the_marginal_likelihood_and_the_priors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = rows(30)
    given = observations(seen, np.random.default_rng(3).normal(scale=0.3, size=30))
    loss = loss_of(given, monkeypatch)
    expected = np.array(list(Hyperparameters.expected(COLUMNS).values.values()))

    def apart(p: Hyperparameters) -> float:
        at = np.array(list(p.values.values()))
        amplitude, other = module._DEVIATIONS
        deviation = [amplitude if n.startswith("amplitude.") else other for n in p.values]
        prior = 0.5 * (((at - expected) / deviation) ** 2).sum()
        return float(
            loss(at)[0] + GaussianProcess(COLUMNS, p, given).log_marginal_likelihood() - prior
        )

    # They differ by a constant, whatever the parameters.
    assert apart(parameters(seed=5)) == pytest.approx(apart(parameters(seed=6)))


def test_parameters_are_found_again_in_draws_of_a_known_process() -> None:
    true = Hyperparameters(
        dict(Hyperparameters.expected(COLUMNS).values)
        | {
            "common.rate": math.log(0.35),
            "amplitude.common": math.log(0.6),
            "noise": math.log(0.02),
            "offset": math.log(0.5),
        }
    )
    seen = rows(250, groups=12)
    plain = np.ones(len(seen))
    covariance = Kernel(COLUMNS, seen, seen).value(true)
    covariance += np.diag(true["noise"] ** 2 * plain)
    values = np.random.default_rng(5).multivariate_normal(np.zeros(len(seen)), covariance)
    given = Observations(seen, values, plain, plain)
    found = fit(COLUMNS, given)
    for name in ("common.rate", "amplitude.common", "noise", "offset"):
        assert abs(found.values[name] - true.values[name]) < 0.4, name
    prior = GaussianProcess(
        COLUMNS, Hyperparameters.expected(COLUMNS), given
    ).log_marginal_likelihood()
    assert GaussianProcess(COLUMNS, found, given).log_marginal_likelihood() > prior
    assert (
        GaussianProcess(COLUMNS, found, given).log_marginal_likelihood()
        > GaussianProcess(COLUMNS, true, given).log_marginal_likelihood() - 15
    )


def test_a_start_that_does_not_name_all_parameters_is_filled_up() -> None:
    seen = rows(20)
    given = observations(seen, np.random.default_rng(3).normal(scale=0.3, size=20))
    found = fit(COLUMNS, given, Hyperparameters({"noise": math.log(0.1), "gone": 3.0}))
    assert found.values.keys() == Hyperparameters.expected(COLUMNS).values.keys()


def test_columns_that_never_vary_stay_as_expected() -> None:
    seen = rows(20)
    seen[:, NAMES.index("width")] = np.nan
    given = observations(seen, np.random.default_rng(3).normal(scale=0.3, size=20))
    expected = Hyperparameters.expected(COLUMNS)
    assert fit(COLUMNS, given)["size.width"] == pytest.approx(expected["size.width"])
