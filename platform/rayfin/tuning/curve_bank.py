"""Extrapolates the early part of a trial's curve to its end, by curves that were seen to theirs.

A curve that has been seen up to a share of its steps is described by its shape alone: the values at
quarters of that share relative to the newest one, in units of the range so far (logarithms, where
all values are positive, so that no loss is predicted below 0), the share, what the schedule of the
learning rate leaves, how often it was evaluated, and by which factor a loss fell. The bank holds
such a description of each of its curves at each evaluation, with the change from there to the end
in the same units. A prediction is the distribution of those changes, weighted by a Gaussian kernel
of the distance between descriptions, as wide as the nearest neighbours are far (Nadaraya-Watson
regression of a conditional distribution; Hall, Wolff and Yao, 1999). No form of the curve is
assumed, and what no curve of the bank resembles gets the distribution of many.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Self

from rayfin.tuning.curves import Curve

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

_NEIGHBOURS = 15
"""The kernel is as wide as the distance to the nearest point of this nearest curve."""
_DOUBT = 0.5
"""The curves that count for an outcome that none of them had; see `Ending.below`."""
_STRIDES = (1, 2, 4)
"""A curve of the bank stands for itself, and for one that was evaluated every other time, or every
fourth."""
_LONGEST = 24
"""A curve with more evaluations is thinned to about so many."""
_LARGEST = 300.0
"""The logarithm of the largest score that is predicted; e to the power 710 is no number."""
_QUARTERS = (0.0, 0.25, 0.5, 0.75)
_SCALES = (0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.7, 2.0)
"""What each number of a description counts for in the distance, in its standard deviations."""


@dataclass(frozen=True)
class Ending:
    """The distribution of the score at a trial's last step: values with their weights."""

    values: Array
    """Rising."""
    weights: Array
    """The probability of each value; they sum to 1."""
    curves: float
    """The number of equally like curves that would say as much (Kish's effective sample size)."""

    @classmethod
    def certain(cls, value: float) -> Self:
        """Return the distribution of a score that is known."""
        import numpy as np

        return cls(np.array([value]), np.ones(1), math.inf)

    def quantile(self, share: float) -> float:
        """Return the score that the end is below with the probability `share`."""
        import numpy as np

        place = int(np.searchsorted(np.cumsum(self.weights), share))
        return float(self.values[min(place, len(self.values) - 1)])

    def below(self, value: float) -> float:
        """Return the probability that the trial ends below `value`: better than that.

        Few curves can't make anything certain: half a curve more counts for either side (the
        estimate of a share under Jeffreys' prior).
        """
        share = float(self.weights[self.values < value].sum())
        if math.isinf(self.curves):
            return share
        return (share * self.curves + _DOUBT) / (self.curves + 2 * _DOUBT)


class CurveBank:
    """Curves that were seen to their ends, and the endings that they predict of others."""

    def __init__(self, curves: Iterable[Curve], *, keeps_best: bool = False) -> None:
        """Describe the curves; with `keeps_best`, as those of trials that keep their best."""
        self._keeps_best = keeps_best
        self._shapes: list[list[float]] = []
        self._changes: list[float] = []
        self._owners: list[int] = []
        self._arrays: _Arrays | None = None
        self.count = 0
        """Curves that it holds."""
        for curve in curves:
            self.add(curve)

    def copy(self) -> CurveBank:
        """Return a bank of the same curves, to which others can be added."""
        other = CurveBank((), keeps_best=self._keeps_best)
        other._shapes, other._changes = self._shapes.copy(), self._changes.copy()
        other._owners, other.count = self._owners.copy(), self.count
        return other

    def add(self, curve: Curve) -> None:
        """Describe one more curve; one not seen to its end, or of a single point, is left out."""
        if len(curve.shares) < 2 or curve.shares[-1] < 1.0:
            return
        known = curve.best_so_far() if self._keeps_best else curve
        whole, positive = _in_logarithms(
            known.until(len(known.shares), -(-len(known.shares) // _LONGEST))
        )
        found = len(self._shapes)
        for stride in _STRIDES:
            for count in range(1, len(whole.shares)):
                if stride > 1 and count <= stride:
                    continue  # the same points as with a smaller stride
                part = whole.until(count, stride)
                if (shape := _described(part, positive)) is not None:
                    self._shapes.append(shape[0])
                    self._changes.append((whole.values[-1] - part.values[-1]) / shape[1])
                    self._owners.append(self.count)
        if len(self._shapes) > found:
            self.count += 1
            self._arrays = None

    def ending(self, curve: Curve) -> Ending | None:
        """Return the distribution of a trial's last score, by its curve until now.

        None where the bank is too small to tell, or where the curve has not moved at all yet.
        """
        import numpy as np

        if self.count <= _NEIGHBOURS or not curve.shares:
            return None
        known = curve.best_so_far() if self._keeps_best else curve
        if known.shares[-1] >= 1.0:
            return Ending.certain(known.values[-1])  # it has ended
        known, positive = _in_logarithms(known)
        if (shape := _described(known, positive)) is None:
            return None
        if self._arrays is None:
            self._arrays = _Arrays.of(self._shapes, self._changes, self._owners)
        bank = self._arrays
        distances = ((bank.shapes - bank.placed(shape[0])) ** 2).sum(axis=1)
        nearest = np.full(self.count, np.inf)
        np.minimum.at(nearest, bank.owners, distances)
        width = max(float(np.partition(nearest, _NEIGHBOURS)[_NEIGHBOURS]), 1e-6)
        weights = np.exp(-(distances - distances.min()) / width)
        weights /= weights.sum()
        values = known.values[-1] + shape[1] * bank.changes
        values = np.exp(np.minimum(values, _LARGEST)) if positive else values
        order = np.argsort(values)
        alike = 1.0 / float((np.bincount(bank.owners, weights) ** 2).sum())
        return Ending(values[order], weights[order], alike)


@dataclass(frozen=True)
class _Arrays:
    """The bank's descriptions, with what each number of them is divided by."""

    shapes: Array
    changes: Array
    owners: NDArray[np.intp]
    middle: Array
    width: Array

    @classmethod
    def of(cls, shapes: list[list[float]], changes: list[float], owners: list[int]) -> Self:
        import numpy as np

        raw = np.array(shapes)
        middle, width = raw.mean(axis=0), (raw.std(axis=0) + 1e-9) / np.array(_SCALES)
        found = np.array(owners, dtype=np.intp)
        return cls((raw - middle) / width, np.array(changes), found, middle, width)

    def placed(self, shape: list[float]) -> Array:
        import numpy as np

        place: Array = (np.array(shape) - self.middle) / self.width
        return place


def _in_logarithms(curve: Curve) -> tuple[Curve, bool]:
    """Return the curve in logarithms, and True, where all its values are positive."""
    if min(curve.values) <= 0 or (curve.base is not None and curve.base <= 0):
        return curve, False
    base = None if curve.base is None else math.log(curve.base)
    return replace(curve, values=tuple(map(math.log, curve.values)), base=base), True


def _described(curve: Curve, positive: bool) -> tuple[list[float], float] | None:
    """Return what the bank knows a curve by, and the range of its values, which is its unit.

    None where the values do not differ, or where a single one is all there is.
    """
    import numpy as np

    shares, values = list(curve.shares), list(curve.values)
    if curve.base is not None:
        shares, values = [0.0, *shares], [curve.base, *values]
    unit = max(values) - min(values)
    if not unit > 1e-9 * max(1.0, abs(values[-1])):
        return None
    share = shares[-1]
    at = [share * quarter for quarter in _QUARTERS]
    shape = [(float(one) - values[-1]) / unit for one in np.interp(at, shares, values)]
    slope = (values[-1] - values[-2]) / unit / (share - shares[-2]) * (1.0 - share)
    left = _rate_left(curve.schedule, share)
    seen = math.log2(min(4, len(curve.shares)))
    place = math.log(share / (1.02 - share))
    # How far a loss has fallen says how far it still may; of other scores, a change says nothing.
    fallen = values[-1] - curve.base if positive and curve.base is not None else 0.0
    return [*shape, place, left, math.asinh(3.0 * slope), seen, fallen], unit


@cache
def _rate_left(schedule: str, share: float) -> float:
    """Return the logarithm of the sum of learning rates to come over that of those gone by.

    Warm-up aside; a schedule that is none of the three is taken for a constant one.
    """
    match schedule:
        case "linear":
            gone = 1.0 - (1.0 - share) ** 2
        case "cosine":
            gone = share + math.sin(math.pi * share) / math.pi
        case _:
            gone = share
    return math.log(max(1e-3, (1.0 - gone) / gone))
