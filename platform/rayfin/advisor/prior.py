"""What practice expects of a setting before any trial: how good it is, and whether it diverges."""

from __future__ import annotations

import math

import numpy as np

from rayfin.advisor.features import COLUMNS, code
from rayfin.advisor.kernel import Array
from rayfin.methods.rates import WIDTH_EXPONENTS, lora_rate, lora_rate_by_width

_ANY_SIZE = 10.0
"""Decades of parameters that stand for an unknown size: 10 billion."""
_BY_SIZE, _LOW_RANK = 1.5, 1.0
"""Both coordinates of methods whose rate is a share of LoRA's, and of low-rank ones, lie below."""
_HALF_DIVERGE, _EARLIER, _WITHIN = 0.95, 0.2, 0.12
"""The decades beyond the usual rate at which half of the trainings of a model of 10 billion
parameters diverge, by how many fewer for each decade of parameters more, and the scale of the
logistic function around it.

A convention. That larger models tolerate less is Wortsman et al. 2023 (arXiv:2309.14322).
"""
_RANK_ONE, _USUAL_RANK, _WITHOUT_RANK = 0.2, 4.0, 2.0
"""What rank 1 adds to the regret, beside an unlimited one; the octaves of the usual rank, 16, and
of the rank, 4, that methods without one count as.

Capacity that is too low costs, and more than enough is harmless (LoRA Without Regret, which
rayfin.methods.rates names); by how much is a convention.
"""


def usual_rate(rows: Array) -> Array:
    """Return the decades by which the usual learning rate of n rows is above the method's own (n).

    It follows the model's width and family where the method's rate is a share of LoRA's, and is 0
    elsewhere. An unknown width is that of a model of the usual shape.
    """
    column = COLUMNS.names.index
    active, parameters = rows[:, column("active")], rows[:, column("parameters")]
    sizes = np.nan_to_num(np.where(np.isnan(active), parameters, active), nan=_ANY_SIZE)
    wider = 2.0 ** np.nan_to_num(rows[:, column("width")], nan=0.0)
    widths = (10.0**sizes * 128 / 12) ** (1 / 3) * wider
    families = {code(family): family for family in WIDTH_EXPONENTS}
    told = zip(widths.tolist(), rows[:, column("brand")].tolist(), strict=True)
    rates = np.array([lora_rate_by_width(width, families.get(brand)) for width, brand in told])
    by_size = (rows[:, COLUMNS.indices(("method_x", "method_y"))] < _BY_SIZE).all(axis=1)
    usual: Array = np.where(by_size, np.log10(rates) - math.log10(lora_rate()), 0.0)
    return usual


def prior_divergence(rows: Array) -> Array:
    """Return the probabilities that trainings at n rows diverge, before any trial (n).

    They grow with the learning rate beyond the usual one, and sooner in larger models.
    """
    column = COLUMNS.names.index
    beyond = np.nan_to_num(rows[:, column("learning_rate")], nan=0.0) - usual_rate(rows)
    sizes = np.nan_to_num(rows[:, column("parameters")], nan=_ANY_SIZE)
    half = _HALF_DIVERGE - _EARLIER * (sizes - _ANY_SIZE)
    probability: Array = 1.0 / (1.0 + np.exp(-(beyond - half) / _WITHIN))
    return probability


def prior_mean(rows: Array) -> Array:
    """Return the regret that practice expects at n rows (n); it grows away from the usual rate.

    Of LoRA at rank 16 it is 0.2 at the usual learning rate, 0.3 at a third of it and 0.55 at a
    fifteenth: enough to decide where no trial does, and little enough for a few trials to overrule.
    A training that diverges has a regret of 1, so that it grows faster beyond the usual rate.
    """
    column = COLUMNS.names.index
    decades = np.nan_to_num(rows[:, column("learning_rate")] - usual_rate(rows), nan=0.5)
    regret = 0.25 + 0.4 * (1.0 - np.exp(-((decades / 0.9) ** 2)))
    coordinates = np.abs(rows[:, COLUMNS.indices(("method_x", "method_y"))])
    octaves = np.nan_to_num(rows[:, column("capacity")], nan=_USUAL_RANK)
    lacking = _RANK_ONE * (2.0 ** (-octaves / 2) - 2.0 ** (-_WITHOUT_RANK / 2))
    regret += np.where((coordinates < _LOW_RANK).all(axis=1), lacking, 0.0)
    expected: Array = regret + prior_divergence(rows) * (1.0 - regret)
    return expected
