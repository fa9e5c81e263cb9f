"""What practice expects of a setting before any trial."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from rayfin.advisor.features import COLUMNS, code
from rayfin.advisor.kernel import Array
from rayfin.advisor.prior import prior_divergence, prior_mean, usual_rate
from rayfin.methods.rates import lora_rate_by_width

LORA = {"method_x": 0.0, "method_y": 0.0, "capacity": 4.0}
IA3 = {"method_x": 0.0, "method_y": 1.5}


def row(**values: float) -> Array:
    return np.array([[values.get(name, math.nan) for name in COLUMNS.names]])


def expected(decades: float, size: float, setting: dict[str, float] = LORA) -> float:
    """The regret at so many decades from the usual rate."""
    usual = float(usual_rate(row(**setting, parameters=size))[0])
    return float(prior_mean(row(**setting, learning_rate=usual + decades, parameters=size))[0])


@pytest.mark.parametrize(
    ("width", "family", "rate"),
    [(4096, "llama", 2.9e-4), (8192, "llama", 1.7e-4), (3584, "qwen", 4.8e-4)],
)
def test_the_rate_by_width_is_the_published_one(width: float, family: str, rate: float) -> None:
    assert lora_rate_by_width(width, family) == pytest.approx(rate, rel=0.03)  # said to 2 digits


def test_the_rate_by_width_stays_within_the_sources() -> None:
    assert lora_rate_by_width(64, "llama") == 1e-3
    assert lora_rate_by_width(1e6, "llama") == 1e-4


def test_the_usual_rate_follows_width_and_family() -> None:
    known = {"parameters": 10.0, "width": 0.0, **LORA}
    llama, qwen, other = (
        float(usual_rate(row(**known, brand=code(name)))[0]) for name in ("llama", "qwen", "yi")
    )
    assert llama < other < qwen
    wider = float(usual_rate(row(**known | {"width": 1.0}, brand=code("llama")))[0])
    assert llama - wider == pytest.approx(0.781 * math.log10(2))
    assert usual_rate(row(**known | IA3)).tolist() == [0.0]  # no source gives its rate by size


@pytest.mark.parametrize("size", [8.0, 10.0, 12.0])
def test_the_regret_grows_away_from_the_usual_rate(size: float) -> None:
    above = [expected(decades, size) for decades in (0.0, 0.5, 1.0, 2.0)]
    below = [expected(-decades, size) for decades in (0.0, 0.5, 1.0, 2.0)]
    assert all(one < other for one, other in (*pairwise(above), *pairwise(below)))
    assert 0.0 < above[0] < 0.4
    assert below[-1] < above[-1] <= 1.0  # what is too small trains slowly, and doesn't diverge


def test_an_unknown_rate_or_size_is_between() -> None:
    unknown = float(prior_mean(row(**LORA, parameters=10.0))[0])
    assert expected(0.0, 10.0) < unknown < 1.0
    assert expected(0.0, math.nan) == pytest.approx(expected(0.0, 10.0))


def test_a_low_rank_costs_and_a_high_one_hardly_helps() -> None:
    regrets = [expected(0.0, 10.0, LORA | {"capacity": octaves}) for octaves in (0, 2, 4, 6, 8)]
    gains = [one - other for one, other in pairwise(regrets)]
    assert all(gain > 0 for gain in gains)
    assert all(one > other for one, other in pairwise(gains))


def test_larger_models_diverge_sooner() -> None:
    rates = np.linspace(-1.0, 2.0, 7)
    small, large = (
        np.concatenate(
            [prior_divergence(row(**LORA, learning_rate=rate, parameters=size)) for rate in rates]
        )
        for size in (9.0, 11.0)
    )
    assert (np.diff(small) > 0).all()
    assert (np.diff(large) > 0).all()
    assert (large > small).all()
