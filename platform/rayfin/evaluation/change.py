"""How far a trial's scores lie from the base model's, and how sure that is.

Both models are scored on the same held-out samples, so a trial records what a paired interval is
made from (`Objective.change`). Samples are the unit: tokens of one answer are alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from rayfin.history.record import finite
from rayfin.metrics import BASE, ONLY_BASE, score_of

if TYPE_CHECKING:
    from rayfin.history.record import TrialRecord

LEVEL = 0.95
# Below it, the mean of skewed losses is too far from normal for a t interval.
LEAST_SAMPLES = 20


@dataclass(frozen=True)
class Change:
    """A score of the base model and of a trial; what is better is a positive gain.

    `gain`, `low` and `high` are in the score's own unit, except that those of an exponential, such
    as perplexity, are the logarithm of the factor by which it fell.
    """

    metric: str
    base: float
    best: float
    gain: float
    samples: int | None
    """Held-out samples; None where the trial did not record how many."""
    low: float | None
    high: float | None
    """Ends of the 95 % interval of the gain, or None."""
    missing: str | None
    """Why there is no interval."""


def change_of(trial: TrialRecord, metric: str) -> Change | None:
    """The change of a score from the base model; None where either did not record it."""
    base, best = finite(trial.metrics.get(BASE + metric)), finite(trial.metrics.get(metric))
    if base is None or best is None:
        return None
    samples = _samples(trial)
    if score_of(metric).exponential_of is not None:
        if min(base, best) <= 0:
            return None
        gain = math.log(base / best)
    else:
        gain = best - base if score_of(metric).better == "more" else base - best
    low, high, missing = _interval(trial, metric, gain, samples)
    return Change(metric, base, best, gain, samples, low, high, missing)


def _samples(trial: TrialRecord) -> int | None:
    data = trial.scenario.get("data")
    rows = data.get("rows_eval") if isinstance(data, dict) else None
    return rows if isinstance(rows, int) and rows > 0 else None


def _interval(
    trial: TrialRecord, metric: str, gain: float, samples: int | None
) -> tuple[float | None, float | None, str | None]:
    """(low, high, None), or (None, None, why there is none)."""
    if samples is None:
        return None, None, "the trial did not record its number of held-out samples"
    not_recorded = "the trial was recorded without what one is made from"
    if score_of(metric).of_samples:
        only_base = trial.metrics.get(metric + ONLY_BASE)
        right, base_right = (
            round(trial.metrics[name] * samples) for name in (metric, BASE + metric)
        )
        only_best = right - base_right + only_base if isinstance(only_base, int) else -1
        if not isinstance(only_base, int) or min(only_best, base_right - only_base) < 0:
            return None, None, not_recorded
        both, neither = base_right - only_base, samples - base_right - only_best
        return *paired_shares(both, only_best, only_base, neither), None
    error = finite(trial.metrics.get(score_of(metric).change_error))
    if error is None:
        return None, None, not_recorded
    if samples < LEAST_SAMPLES:
        return None, None, f"{samples} held-out samples are too few for one"
    reach = t_quantile(samples - 1) * error
    return gain - reach, gain + reach, None


def paired_shares(both: int, first: int, second: int, neither: int) -> tuple[float, float]:
    """95 % interval of the difference of two shares of the same samples.

    Of the samples, `both` fulfil both conditions, `first` and `second` that one alone. Newcombe,
    Improved confidence intervals for the difference between binomial proportions based on paired
    data, Statistics in Medicine 17 (1998), 2635-2650, method 10: Wilson's intervals of the two
    shares, joined with their correlation.
    """
    samples = both + first + second + neither
    p, q = (both + first) / samples, (both + second) / samples
    (p_low, p_high), (q_low, q_high) = (wilson(share * samples, samples) for share in (p, q))
    spread = math.sqrt((both + first) * (second + neither) * (both + second) * (first + neither))
    cross = float(both * neither - first * second)
    if cross > 0:
        cross = max(0.0, cross - samples / 2)
    phi = cross / spread if spread else 0.0

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    return p - q - reach(p - p_low, q_high - q), p - q + reach(p_high - p, q - q_low)


def wilson(hits: float, samples: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927), which stays between 0 and 1."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share, scale = hits / samples, 1 + z * z / samples
    middle = (share + z * z / (2 * samples)) / scale
    reach = z / scale * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples**2))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t with at least 9 degrees of freedom, to 4 digits.

    Abramowitz and Stegun, Handbook of Mathematical Functions (1964), equation 26.7.5.
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(freedom**power) for power, term in enumerate(terms, 1))
