"""Curves of trials: their held-out scores by the share of their steps, and those that are kept."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Self

from rayfin.history import History, TrialRecord
from rayfin.metrics import score_of
from rayfin.paths import write_whole

REFERENCE = Path(__file__).with_name("curves.jsonl.gz")
"""Curves that come with rayfin; experiments/reference_curves.py made them."""
_LEARNED = 400
"""The number of the history's newest finished trials whose curves are used."""


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
    learning_rate: float | None = None
    """Its peak."""
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

    def up_to(self, share: float) -> Curve:
        """Return its points up to a share, or the one at that share where the first is later."""
        count = sum(own <= share + 1e-9 for own in self.shares)
        if count:
            return self.until(count)
        return replace(self, shares=(share,), values=(self.at(share),))

    def at(self, share: float) -> float:
        """Return the score at a share, between points on the line that joins them."""
        import numpy as np

        start = ([], []) if self.base is None else ([0.0], [self.base])
        return float(np.interp(share, [*start[0], *self.shares], [*start[1], *self.values]))

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


def past_curves(history: History, metric: str) -> Iterator[Curve]:
    """Yield the curves of the history's newest finished trials, recalled ones aside."""
    for row in history.trials(status="finished", newest_first=True, limit=_LEARNED):
        if "recalled_from" not in row.scenario:
            curve = Curve.of(row, metric)
            if curve is not None:
                yield curve
