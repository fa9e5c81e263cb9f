"""Chooses a learning rate by probes: the first steps of a few trials.

The rates are on a ladder of half decades from the rate that was advised: that rate, and a step up;
then always a step beyond the best one where it stands at an end of the ladder, or else halfway
between it and the better of its neighbours. Each is trained for the same few steps of the whole
trial, in its schedule, and judged by its score after them. What its curve is predicted to come to
is told and does not decide: so early, a prediction errs by more than the rates differ, and on the
ladders of experiments/benchmarks/probes.py it chose worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from rayfin.tuning.curve_bank import CurveBank, Ending
from rayfin.tuning.curves import Curve

STEP = math.sqrt(10.0)
"""From one rate of the ladder to the next."""
SHARE = 0.1
"""The share of a trial's steps that a probe has."""


@dataclass(frozen=True)
class Probe:
    """A rate that was tried, and what it is predicted to come to."""

    rate: float
    score: float
    """Where less is better; infinite where the probe failed or diverged."""
    ending: Ending | None
    """What the score is predicted to come to at the last step; None where nothing can be said."""


def probe_rates(
    advised: float,
    train: Callable[[float], Curve | None],
    bank: CurveBank,
    another: Callable[[int], bool],
) -> list[Probe]:
    """Probe one rate after the other, and return them all, in the order in which they were tried.

    `train` returns the curve of the first steps at a rate, None where it failed or diverged;
    `another` is told how many probes there are and returns whether to make one more. None is made
    of a rate that was probed already, which ends them.
    """
    probes: list[Probe] = []
    while another(len(probes)):
        rate = next_rate(advised, probes)
        if any(probe.rate == rate for probe in probes):
            break
        curve = train(rate)
        if curve is None:
            probes.append(Probe(rate, math.inf, None))
        else:
            probes.append(Probe(rate, curve.values[-1], bank.ending(curve)))
    return probes


def next_rate(advised: float, probes: list[Probe]) -> float:
    """Return the rate to probe next, to two digits but for the one that was advised."""
    if not probes:
        return advised
    return float(f"{_next(advised, probes):.2g}")


def _next(advised: float, probes: list[Probe]) -> float:
    if len(probes) == 1:
        return advised * STEP
    ordered = sorted(probes, key=lambda probe: probe.rate)
    at = min(range(len(ordered)), key=lambda place: ordered[place].score)
    if at == 0:
        return ordered[0].rate / STEP
    if at == len(ordered) - 1:
        return ordered[-1].rate * STEP
    beside = min((at - 1, at + 1), key=lambda place: ordered[place].score)
    return math.sqrt(ordered[at].rate * ordered[beside].rate)


def best_probe(probes: list[Probe]) -> Probe | None:
    """Return the probe with the best score; None where all failed."""
    found = min(probes, key=lambda probe: probe.score, default=None)
    return None if found is None or math.isinf(found.score) else found
