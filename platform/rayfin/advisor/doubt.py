"""Find trials that can't be right, and estimate how noisy each source of trials is.

A score that can't be (a loss of 0), or that lies far below what any trial near it reached, is set
aside. Of the others, a Gaussian process over the trials of one scenario tells how far each source
(an imported file, the reference, own trials) scatters around what its settings explain, and which
trials contradict those around them: both count for less. It is a process with Student-t noise,
fitted by expectation maximisation (Lange, Little and Taylor 1989; Rasmussen & Williams 2006,
section 9.3), with a scale of its own for each source. Nothing but the scenario's own trials
decides, so that an import can't change what the trials of other scenarios count.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rayfin.advisor.features import COLUMNS
from rayfin.advisor.kernel import Array, Hyperparameters, Kernel
from rayfin.metrics import score_of

PRIOR = Hyperparameters.expected(COLUMNS)
_FREEDOM = 4.0
"""The degrees of freedom of Student's t: the usual choice (Lange et al. 1989)."""
_USUAL_TRIALS = 4.0
"""For how many trials with the usual noise the prior of a source's noise counts."""
_ROUNDS = 15
_JITTER = 1e-6
_NEAR = 0.3
"""The correlation of settings from which one is a neighbour: within about 1.5 length scales."""
_NEIGHBOURS = 4
"""The number of neighbours from which they tell that a score can't be."""
_FAR_BELOW = 5.0
"""By what factor a loss lies below that of the best quarter of its neighbours to be set aside.

The finite losses of one model differ by a factor of 1.15 at most in the public sweep of LoRA's
rates; on a data set with few answers, where the loss is small, they may differ by more.
"""
_OUTLIER, _APART = 0.25, 0.3
"""The weight below which a trial is named an outlier that is this far, as a regret, from what the
others say of it."""


def impossible(values: Array, metric: str) -> NDArray[np.bool_]:
    """Return which values of a score no trained model can have (n); NaN may be.

    A loss is above 0, its exponential above 1, and a share from 0 to 1.
    """
    measured = score_of(metric)
    if measured.kind == "share":
        return np.asarray((values < 0) | (values > 1))
    return np.asarray(values <= (1.0 if measured.exponential_of else 0.0))


def far_below(rows: Array, values: Array, metric: str) -> NDArray[np.bool_]:
    """Return which of n values lie far below all that similar settings reached (n); NaN doesn't.

    Only losses can: a share that is `_FAR_BELOW` times as good is no wonder.
    """
    found = np.zeros(len(values), dtype=bool)
    measured = score_of(metric)
    if measured.kind == "share" or len(values) <= _NEIGHBOURS:
        return found
    losses = np.log(np.maximum(values, 1e-300)) if measured.exponential_of else values
    near = Kernel(COLUMNS, rows, rows).matern(PRIOR, "common")[0] >= _NEAR
    np.fill_diagonal(near, val=False)
    for index in np.argsort(losses, kind="stable"):
        others = losses[near[index] & ~found & ~np.isnan(losses)]
        if np.isnan(losses[index]) or len(others) < _NEIGHBOURS:
            continue
        found[index] = losses[index] < np.quantile(others, 0.25) / _FAR_BELOW
    return found


def excess_noise(
    rows: Array, values: Array, usual: Array, sources: Array
) -> tuple[Array, NDArray[np.bool_], Array]:
    """Return the noise of n settings of one scenario beyond the usual one, and which are outliers.

    `values` are regrets less their prior means (n), `usual` the expected variances of their noise
    as multiples of that of the prior (n), and `sources` the code of each one's source (n). The
    results are the variance beyond it, in squared regrets (n), flags (n), and the deviation of each
    one's source as a multiple of the usual one (n).
    """
    expected = PRIOR["noise"] ** 2 * usual
    kernel = Kernel(COLUMNS, rows, rows).value(PRIOR, float(usual.max(initial=1.0)))
    weights, scales = np.ones(len(rows)), np.ones(len(rows))
    variance: Array = expected
    inverse: Array = np.eye(len(rows))
    for _ in range(_ROUNDS):
        inverse = np.asarray(np.linalg.inv(kernel + np.diag(variance + _JITTER)), np.float64)
        explained = kernel @ inverse
        left = values - explained @ values
        squares = left**2 + (kernel - explained @ kernel).diagonal()
        weights = (_FREEDOM + 1.0) / (_FREEDOM + squares / (expected * scales))
        weights = np.minimum(weights, 1.0)
        for source in np.unique(sources):
            own = sources == source
            total = _USUAL_TRIALS + (weights * squares / expected)[own].sum()
            scales[own] = max(1.0, total / (_USUAL_TRIALS + own.sum()))
        variance = expected * scales / weights
    apart = np.abs(inverse @ values) / inverse.diagonal()  # from what all others say of it
    outliers = (weights < _OUTLIER) & (apart > _APART)
    return variance - expected, outliers, np.sqrt(scales)
