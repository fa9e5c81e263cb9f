"""The trials of a history as arrays: what the learned model is fitted to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from rayfin.advisor.features import COLUMNS, row_of
from rayfin.advisor.process import Array
from rayfin.errors import HistoryError
from rayfin.history import TrialRecord
from rayfin.metrics import BASE, score_names, score_of
from rayfin.paths import write_whole
from rayfin.statuses import SCORED

Flags = NDArray[np.bool_]

_WORST_OF_MEDIAN = 4.0
_LARGEST = 1e6  # no loss, and no perplexity of a model that learned anything, is larger
_WORTH = 4  # a setting measured more often than this is not known better: seeds are not all of it

# "eval_loss became inf at step 3", "diverged", "train loss is nan"; not "no finance.jsonl".
_DIVERGED = re.compile(r"diverg|\bloss is\b|\b(nan|inf)\b", re.IGNORECASE)


@dataclass(frozen=True)
class TrialTable:
    """A row a trial; `ids` name them in the history."""

    ids: NDArray[np.str_]
    rows: Array
    """n x the columns of `features.COLUMNS`."""
    scores: Array
    """n x `metrics.score_names()`, less being better in all; NaN where it was not measured."""
    bases: Array
    """The same of the untrained model."""
    diverged: Flags

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, records: Iterable[TrialRecord]) -> Self:
        """Of all trials that say something about their setting; the others are left out.

        Those are: trials that still run, whose setting can't have been (a rank of -3), that ended
        for a reason that is not the setting's, or that hold no score.
        """
        ids, rows, scores, bases, diverged = [], [], [], [], []
        names, measured = COLUMNS.names, score_names()
        for record in records:
            ended = record.status in SCORED
            if not ended and not has_diverged(record):
                continue
            values = row_of(record)
            if values is None:
                continue
            here = _scores(record, "") if ended else [np.nan] * len(measured)
            if ended and np.isnan(here).all():
                continue
            ids.append(record.trial_id)
            rows.append([values[name] for name in names])
            scores.append(here)
            bases.append(_scores(record, BASE))
            diverged.append(not ended)
        width = (len(rows), len(measured))
        return cls(
            np.array(ids, dtype=np.str_),
            np.array(rows, dtype=float).reshape(len(rows), len(names)),
            np.array(scores, dtype=float).reshape(width),
            np.array(bases, dtype=float).reshape(width),
            np.array(diverged, dtype=bool),
        )

    def column(self, name: str) -> Array:
        return self.rows[:, COLUMNS.names.index(name)]

    def take(self, chosen: NDArray[np.intp] | Flags) -> TrialTable:
        return TrialTable(
            self.ids[chosen],
            self.rows[chosen],
            self.scores[chosen],
            self.bases[chosen],
            self.diverged[chosen],
        )

    def joined(self, other: TrialTable) -> TrialTable:
        return TrialTable(
            np.concatenate([self.ids, other.ids]),
            np.concatenate([self.rows, other.rows]),
            np.concatenate([self.scores, other.scores]),
            np.concatenate([self.bases, other.bases]),
            np.concatenate([self.diverged, other.diverged]),
        )

    def save(self, path: Path) -> None:
        """Whole, or not at all; numbers and text only."""
        with write_whole(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **vars(self), columns=np.array(COLUMNS.names))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises HistoryError for a file that is none of this version's; nothing in it is run."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
                columns = tuple(held["columns"])
                table = cls(**{name: held[name] for name in cls.__dataclass_fields__})
        except Exception as error:  # of a broken file zipfile and numpy raise nearly anything
            raise HistoryError(f"'{path}' is no table of trials ({error}); remove it") from error
        if columns != COLUMNS.names or not table._like(cls.of(())):
            raise HistoryError(f"'{path}' was made by another version; remove it")
        return table

    def _like(self, other: TrialTable) -> bool:
        """Whether its arrays are of the same kind as `other`'s, and all of one length."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return all(
            (mine.dtype.kind, mine.shape) == (theirs.dtype.kind, (len(self), *theirs.shape[1:]))
            for mine, theirs in pairs
        )


@dataclass(frozen=True)
class ScenarioTrials:
    """What was tried in one scenario, each distinct setting once."""

    rows: Array
    charges: Array
    """How far each fell short of the best, of the way from the best to the worst: 0 to 1.

    1 too where the training diverged.
    """
    counts: Array
    """How often it was measured; at most `_WORTH`."""
    first: NDArray[np.intp]
    """For each, its first trial's place in the table."""
    diverged: Array
    """For each, the share of its trials that diverged."""
    spread: float
    """What a charge of 1 is, in the metric's unit."""
    best: float
    """Its best score; less is better."""
    code: float
    """Of its scenario."""

    def __len__(self) -> int:
        return len(self.charges)


def groups_of(table: TrialTable, metric: str | None = None) -> dict[float, ScenarioTrials]:
    """Code of each scenario -> its group, for those that say anything about settings.

    Scores are compared within a group only, and only by one metric: `metric` where the group has
    it, else the one that most of its settings have.
    """
    codes = table.column("group")
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=np.nan))
    found = {}
    for places in np.split(order, starts[1:]) if len(order) else ():
        group = _group(table, places, metric)
        if group is not None:
            found[float(codes[places[0]])] = group
    return found


def _group(
    table: TrialTable, places: NDArray[np.intp], metric: str | None
) -> ScenarioTrials | None:
    names, scores = score_names(), table.scores[places]
    settings = _settings(table.rows[places])
    counts = [len(np.unique(settings[~np.isnan(values)])) for values in scores.T]
    chosen = int(np.argmax(counts))
    if metric is not None and counts[names.index(metric)]:
        chosen = names.index(metric)
    known = table.diverged[places] | ~np.isnan(scores[:, chosen])
    if not counts[chosen]:
        return None
    places, scores = places[known], scores[known, chosen]
    settings = settings[known]
    _, first, count = np.unique(settings, return_index=True, return_counts=True)
    if len(first) < 2:
        return None
    scored = ~np.isnan(scores)
    # A setting that was run a thousand times is still one, and its score is not the usual one.
    usual = float(np.median(_means(scores[scored], settings[scored])))
    charges, spread, best = _charges(scores, table.bases[places, chosen], names[chosen], usual)
    return ScenarioTrials(
        table.rows[places[first]], _means(charges, settings),
        np.minimum(count, _WORTH).astype(float), places[first], 1.0 - _means(scored, settings),
        spread, best, float(table.column("group")[places[0]]),
    )  # fmt: skip


def _settings(rows: Array) -> NDArray[np.intp]:
    """A number for each row, the same for equal ones."""
    numbers: dict[bytes, int] = {}
    alike = np.round(rows, 6) + 0.0  # -0.0 has other bytes than 0.0
    return np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in alike])


def _means(values: Array | Flags, settings: NDArray[np.intp]) -> Array:
    """Of each setting that there is, in their order."""
    _, places = np.unique(settings, return_inverse=True)
    means: Array = np.bincount(places.ravel(), weights=values) / np.bincount(places.ravel())
    return means


def charges_of(values: Array, metric: str) -> Array | None:
    """Charges of one scenario's values of `metric`, NaN where a trial failed; None if all did."""
    if np.isnan(values).all():
        return None
    sign = score_of(metric).sign
    return _charges(sign * values, np.zeros(0), metric, float(np.nanmedian(sign * values)))[0]


def _charges(scores: Array, bases: Array, metric: str, usual: float) -> tuple[Array, float, float]:
    """Charges, spread and best; `usual` is the median, each setting counted once."""
    best = float(np.nanmin(scores))
    # One absurd score must not make all the others look alike; and worse than the untrained model
    # is as bad as it gets.
    worst = min(float(np.nanmax(scores)), best + _WORST_OF_MEDIAN * (usual - best))
    base = bases[~np.isnan(bases)]
    if len(base) and best < float(np.median(base)):
        worst = min(worst, float(np.median(base)))
    measured = score_of(metric)
    share = 1.0 if measured.kind == "share" else abs(best)
    spread = max(worst - best, measured.least_spread * share, 1e-9)
    charges = np.clip((scores - best) / spread, 0.0, 1.0)
    return np.where(np.isnan(scores), 1.0, charges), spread, best


def has_diverged(record: TrialRecord) -> bool:
    """Whether a trial failed because its loss ran away: the fault of its setting."""
    return record.status == "failed" and _DIVERGED.search(record.error or "") is not None


def _scores(record: TrialRecord, prefix: str) -> list[float]:
    """The metrics with less better; what is no sensible number is NaN."""
    found = []
    for name in score_names():
        value = record.metrics.get(prefix + name)
        sign = score_of(name).sign
        if isinstance(value, bool) or not isinstance(value, int | float):
            value = np.nan
        found.append(sign * float(value) if 0 <= value <= _LARGEST else np.nan)
    return found
