"""What practice expects of a setting before any trial: the mean of the advisor's process."""

from __future__ import annotations

import math

import numpy as np

from rayfin.advisor.features import COLUMNS
from rayfin.advisor.kernel import Array
from rayfin.methods.rates import lora_rate

_ANY_SIZE = 10.0  # decades: 10 billion parameters, whose rate practice takes for any
_BY_SIZE = 1.5  # coordinates below it: those of methods whose rate is a share of LoRA's


def prior_mean(rows: Array) -> Array:
    """Return the regret that practice expects at n rows (n); it grows away from the usual rate.

    It is 0.25 at the usual learning rate, 0.35 at three times more or less, and 0.6 at fifteen
    times: enough to decide where no trial does, and little enough for a few trials to overrule. The
    usual rate is that for the model's size, where it is known.
    """
    decades = np.nan_to_num(rows[:, COLUMNS.names.index("learning_rate")], nan=0.5)
    sizes = np.nan_to_num(rows[:, COLUMNS.names.index("parameters")], nan=_ANY_SIZE)
    usual = np.array([math.log10(lora_rate(10 ** (size - 9))) for size in sizes])
    by_size = (rows[:, COLUMNS.indices(("method_x", "method_y"))] < _BY_SIZE).all(axis=1)
    decades = decades - np.where(by_size, usual - math.log10(lora_rate()), 0.0)
    regret: Array = 0.25 + 0.4 * (1.0 - np.exp(-((decades / 0.9) ** 2)))
    return regret
