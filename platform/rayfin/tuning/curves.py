"""Extrapolates the early part of a trial's curve to its end, by curves that were seen to theirs.

A curve that has been seen up to a share of its steps is described by its shape alone: the values at
quarters of that share relative to the newest one, in units of the range so far, the share, what the
schedule of the learning rate leaves, and how often it was evaluated. The bank holds such a
description of each of its curves at each evaluation, with the change from there to the end in the
same units. A prediction is the distribution of those changes, weighted by a Gaussian kernel of the
distance between descriptions, whose width is that of the nearest neighbours
(Nadaraya-Watson regression of a conditional distribution; Hall, Wolff and Yao, 1999). No form of
the curve is assumed, and what no curve of the bank resembles gets the distribution of many.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rayfin.history import TrialRecord
from rayfin.metrics import score_of
from rayfin.paths import write_whole

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

REFERENCE = Path(__file__).with_name("curves.jsonl.gz")
"""Curves that come with rayfin; experiments/reference_curves.py made them."""

_NEIGHBOURS = 15
"""The kernel is as wide as the distance to the nearest point of this nearest curve."""
_DOUBT = 0.5
"""The curves that count for an outcome that none of them had; see `Ending.below`."""
_STRIDES = (1, 2, 4)
"""A curve of the bank stands for itself, and for one that was evaluated every other time, or every
fourth."""
_LONGEST = 24
"""A curve with more evaluations is thinned to about so many."""
_QUARTERS = (0.0, 0.25, 0.5, 0.75)
_SCALES = (0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.7)
"""What each number of a description counts for in the distance, in its standard deviations."""


@dataclass(frozen=True)
class Curve:
    """The held-out scores of a trial by the share of its steps; less is better."""

    task: str
    """What its model, data and length are; curves of one task may have one cause."""
    shares: tuple[float, ...]
    """Shares of the trial's optimizer steps, rising, above 0 and at most 1."""
    values: tuple[float, ...]
    """The score at each; finite."""
    base: float | None = None
    """The score of the untrained model, at share 0."""
    schedule: str = "cosine"
    """`train.lr_scheduler_type`."""
    seconds: float | None = None
    """What all steps of the trial took, where the curve has them all."""

    @classmethod
    def of(
        cls, row: TrialRecord | Mapping[str, Any], metric: str, *, ended: bool = True
    ) -> Self | None:
        """Return the curve of a trial of the history, or None where it has none to learn from.

        Where `ended`, its last point must be that of its last step.
        """
        found = row.model_dump() if isinstance(row, TrialRecord) else row
        train, score = found["spec"].get("train", {}), score_of(metric)
        steps = train.get("max_steps")
        if not isinstance(steps, int) or steps < 1:
            return None
        points: dict[float, float] = {}
        for point in found["curve"]:
            value, step = score.at(point), point.get("step")
            if not isinstance(step, (int, float)) or not isinstance(value, (int, float)):
                continue
            if not 0 < step <= steps or not math.isfinite(value):
                continue
            points[step / steps] = score.sign * value
        base = found["metrics"].get(f"base_{metric}")
        known = isinstance(base, (int, float)) and math.isfinite(base)
        curve = cls(
            task=str(found.get("sweep_id", "")),
            shares=tuple(sorted(points)),
            values=tuple(points[share] for share in sorted(points)),
            base=score.sign * base if known else None,
            schedule=str(train.get("lr_scheduler_type", "cosine")),
        )
        if not curve.shares or (ended and curve.shares[-1] < 1.0):
            return None
        return curve

    def until(self, count: int, stride: int = 1) -> Curve:
        """Return its first `count` points, and of these every `stride`-th, the last among them."""
        places = range(count - 1, -1, -stride)[::-1]
        return replace(
            self,
            shares=tuple(self.shares[at] for at in places),
            values=tuple(self.values[at] for at in places),
        )

    def best_so_far(self) -> Curve:
        """Return the curve of a trial that keeps its best evaluation: it never rises."""
        best, least = [], math.inf
        for value in self.values:
            least = min(least, value)
            best.append(least)
        return replace(self, values=tuple(best))

    def as_dict(self) -> dict[str, Any]:
        """Return it as a line of the shipped file has it, to four digits of the score."""
        rounded = {
            "shares": [round(share, 5) for share in self.shares],
            "values": [float(f"{value:.5g}") for value in self.values],
            "base": None if self.base is None else float(f"{self.base:.5g}"),
            "seconds": None if self.seconds is None else round(self.seconds, 2),
        }
        return asdict(self) | rounded

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Return the curve of such a line."""
        lists = {name: tuple(values[name]) for name in ("shares", "values")}
        return cls(**(dict(values) | lists))


@dataclass(frozen=True)
class Ending:
    """The distribution of the score at a trial's last step: values with their weights."""

    values: Array
    """Rising."""
    weights: Array
    """Of the sum 1."""
    curves: float
    """The number of equally like curves that would say as much (Kish's effective sample size)."""

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

    def add(self, curve: Curve) -> None:
        """Describe one more curve; one not seen to its end, or of a single point, is left out."""
        if len(curve.shares) < 2 or curve.shares[-1] < 1.0:
            return
        known = curve.best_so_far() if self._keeps_best else curve
        known = known.until(len(known.shares), -(-len(known.shares) // _LONGEST))
        found = len(self._shapes)
        for stride in _STRIDES:
            for count in range(1, len(known.shares)):
                if stride > 1 and count <= stride:
                    continue  # the same points as with a smaller stride
                part = known.until(count, stride)
                if (shape := _described(part)) is not None:
                    self._shapes.append(shape[0])
                    self._changes.append((known.values[-1] - part.values[-1]) / shape[1])
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
            return Ending(np.array([known.values[-1]]), np.ones(1), math.inf)  # it has ended
        if (shape := _described(known)) is None:
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


def _described(curve: Curve) -> tuple[list[float], float] | None:
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
    return [*shape, place, left, math.asinh(3.0 * slope), seen], unit


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


def pack(curves: Sequence[Curve], out: Path) -> None:
    """Write curves as lines of JSON, compressed; the same curves make the same bytes."""
    lines = sorted(json.dumps(curve.as_dict()) for curve in curves)
    text = "".join(f"{line}\n" for line in lines)
    with write_whole(out) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))


def read_curves(packed: bytes) -> list[Curve]:
    """Return the curves of such a file."""
    lines = gzip.decompress(packed).decode().splitlines()
    return [Curve.parse(json.loads(line)) for line in lines]


def reference_curves() -> list[Curve]:
    """Return the curves that come with rayfin."""
    return read_curves(resources.files("rayfin.tuning").joinpath(REFERENCE.name).read_bytes())
