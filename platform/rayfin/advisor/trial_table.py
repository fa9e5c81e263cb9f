"""The trials of a history as arrays, and the regret of each setting in its scenario."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from rayfin.advisor.doubt import far_below, impossible
from rayfin.advisor.features import COLUMNS, code, row_of
from rayfin.advisor.kernel import Array
from rayfin.errors import HistoryError
from rayfin.history import TrialRecord
from rayfin.history.comparable import comparison_groups
from rayfin.metrics import BASE, score_names, score_of
from rayfin.paths import write_whole
from rayfin.statuses import SCORED

Flags = NDArray[np.bool_]

_WORST_OF_MEDIAN = 4.0
_LARGEST = 1e6  # no loss, and no perplexity of a model that learned anything, is larger
_OF_TOKENS = "eval_loss"  # of all scores, those of samples too: a table has one group for them all
_MOST_COMPARED = 400
"""The most settings of a scenario, from the lowest loss, that tell which losses can't be."""
_MAX_COUNT = 4  # more measurements don't make a setting better known: seeds are not all of it

# "eval_loss became inf at step 3", "diverged", "train loss is nan"; not "no finance.jsonl".
_DIVERGED = re.compile(r"diverg|\bloss is\b|\b(nan|inf)\b", re.IGNORECASE)


@dataclass(frozen=True)
class TrialTable:
    """The features and scores of n trials as arrays; `ids` are their ids in the history."""

    ids: NDArray[np.str_]
    rows: Array
    """The features (n x columns of `features.COLUMNS`)."""
    scores: Array
    """The scores (n x `metrics.score_names()`), less being better; NaN where not measured."""
    bases: Array
    """The scores of the untrained model, in the same form."""
    diverged: Flags
    sources: Array
    """The code of each trial's source (n): an imported table, the reference, or this history."""

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, records: Iterable[TrialRecord]) -> Self:
        """Make a table of the trials that say something about their setting.

        Left out are trials that still run, that have an impossible setting (a rank of -3), that
        ended for a reason other than their setting, or that have no score, and probes.
        """
        kept: list[TrialRecord] = []
        rows, scores, bases, diverged, sources = [], [], [], [], []
        names, measured = COLUMNS.names, score_names()
        for record in records:
            ended = record.status in SCORED
            if record.status == "stopped" and "probe" in record.scenario:
                continue  # what its first steps say of the last, its curve is asked for
            if not ended and not has_diverged(record):
                continue
            values = row_of(record)
            if values is None:
                continue
            here = _scores(record, "") if ended else [np.nan] * len(measured)
            if ended and np.isnan(here).all():
                continue
            kept.append(record)
            rows.append([values[name] for name in names])
            scores.append(here)
            bases.append(_scores(record, BASE))
            diverged.append(not ended)
            sources.append(_source(record))
        width = (len(rows), len(measured))
        features = np.array(rows, dtype=float).reshape(len(rows), len(names))
        group = names.index("group")
        features[:, group] = _by_comparison(kept, features[:, group])
        return cls(
            np.array([record.trial_id for record in kept], dtype=np.str_),
            features,
            np.array(scores, dtype=float).reshape(width),
            np.array(bases, dtype=float).reshape(width),
            np.array(diverged, dtype=bool),
            np.array(sources, dtype=float),
        )

    def column(self, name: str) -> Array:
        """Return the values of one column of features (n)."""
        return self.rows[:, COLUMNS.names.index(name)]

    def take(self, chosen: NDArray[np.intp] | Flags) -> TrialTable:
        """Return the chosen trials."""
        return TrialTable(*(values[chosen] for values in vars(self).values()))

    def joined(self, other: TrialTable) -> TrialTable:
        """Return the trials of both tables."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return TrialTable(*(np.concatenate(both) for both in pairs))

    def save(self, path: Path) -> None:
        """Write the table to a file, whole or not at all; it holds numbers and text only."""
        with write_whole(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **vars(self), columns=np.array(COLUMNS.names))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a table from a file without running anything in it.

        Raises HistoryError for a file that this version did not write.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
                columns = tuple(held["columns"])
                table = cls(**{name: held[name] for name in cls.__dataclass_fields__})
        except Exception as error:  # of a broken file zipfile and numpy raise nearly anything
            raise HistoryError(f"'{path}' is no table of trials ({error}); remove it") from error
        if columns != COLUMNS.names or not table._has_layout_of(cls.of(())):
            raise HistoryError(f"'{path}' was made by another version; remove it")
        return table

    def _has_layout_of(self, other: TrialTable) -> bool:
        """Whether the arrays have the same types and columns as `other`'s, and one length."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return all(
            (mine.dtype.kind, mine.shape) == (theirs.dtype.kind, (len(self), *theirs.shape[1:]))
            for mine, theirs in pairs
        )


@dataclass(frozen=True)
class ScenarioTrials:
    """The distinct settings that were tried in one scenario, and the regret of each."""

    rows: Array
    """The features of each setting (n x columns)."""
    regrets: Array
    """The normalised regret of each setting (n): 0 for the best score, 1 for the worst.

    It is 1, too, where the training diverged.
    """
    counts: Array
    """How often each setting was measured (n), at most `_MAX_COUNT`."""
    first: NDArray[np.intp]
    """The index in the table of each setting's first trial (n)."""
    diverged: Array
    """The share of each setting's trials that diverged (n)."""
    sources: Array
    """The code of each setting's source (n): settings of two sources count as two."""
    spread: float
    """The difference of scores that is a regret of 1, in the metric's unit."""
    best: float
    """The best score; less is better."""
    code: float
    """The code of the scenario: its column `group`."""

    def __len__(self) -> int:
        return len(self.regrets)


def group_by_scenario(table: TrialTable, metric: str | None = None) -> dict[float, ScenarioTrials]:
    """Return the trials of each scenario that says something about settings, by its code.

    Scores are compared within a scenario only, and by one metric only: `metric` where trials of the
    scenario have it, or else the one that most of its settings have.
    """
    codes = table.column("group")
    found = {}
    for indices in _by_scenario(table):
        group = _group(table, indices, metric)
        if group is not None:
            found[float(codes[indices[0]])] = group
    return found


def set_aside(table: TrialTable, metric: str | None = None) -> NDArray[np.intp]:
    """Return the indices of trials whose score can't be, which `group_by_scenario` leaves out.

    It is no score of a trained model (`impossible`), or lies far below all others near it.
    """
    found = [_doubted(table, indices, metric)[0] for indices in _by_scenario(table)]
    return np.sort(np.concatenate(found)) if found else np.zeros(0, dtype=np.intp)


def _by_scenario(table: TrialTable) -> list[NDArray[np.intp]]:
    """Return the indices of each scenario's trials."""
    codes = table.column("group")
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=np.nan))
    return np.split(order, starts[1:]) if len(order) else []


def _doubted(
    table: TrialTable, indices: NDArray[np.intp], metric: str | None
) -> tuple[NDArray[np.intp], NDArray[np.intp], int]:
    """Return the indices to set aside, the others, and the place of the score to compare."""
    names, scores = score_names(), table.scores[indices]
    settings = _settings(table, indices)
    counts = [len(np.unique(settings[~np.isnan(values)])) for values in scores.T]
    chosen = int(np.argmax(counts))
    if metric is not None and counts[names.index(metric)]:
        chosen = names.index(metric)
    name = names[chosen]
    values = score_of(name).sign * scores[:, chosen]
    wrong = impossible(values, name) & ~table.diverged[indices]
    left = np.flatnonzero(~wrong & ~np.isnan(values))
    if len(left):
        _, first = np.unique(settings[left], return_index=True)
        means = _means(values[left], settings[left])
        lowest = np.argsort(means, kind="stable")[:_MOST_COMPARED]
        low = lowest[far_below(table.rows[indices[left[first[lowest]]]], means[lowest], name)]
        wrong[left] = np.isin(settings[left], settings[left[first[low]]])
    return indices[wrong], indices[~wrong], chosen


def _group(
    table: TrialTable, indices: NDArray[np.intp], metric: str | None
) -> ScenarioTrials | None:
    _, indices, chosen = _doubted(table, indices, metric)
    names, scores = score_names(), table.scores[indices]
    settings = _settings(table, indices)
    known = table.diverged[indices] | ~np.isnan(scores[:, chosen])
    if np.isnan(scores[:, chosen]).all():
        return None
    indices, scores = indices[known], scores[known, chosen]
    settings = settings[known]
    _, first, count = np.unique(settings, return_index=True, return_counts=True)
    if len(first) < 2:
        return None
    scored = ~np.isnan(scores)
    # A setting that was run a thousand times is still one, and its score is not the usual one.
    usual = float(np.median(_means(scores[scored], settings[scored])))
    regrets, spread, best = _regrets(scores, table.bases[indices, chosen], names[chosen], usual)
    return ScenarioTrials(
        table.rows[indices[first]], _means(regrets, settings),
        np.minimum(count, _MAX_COUNT).astype(float), indices[first], 1.0 - _means(scored, settings),
        table.sources[indices[first]], spread, best, float(table.column("group")[indices[0]]),
    )  # fmt: skip


def _source(record: TrialRecord) -> float:
    """Return the code of where a trial comes from."""
    imported = record.scenario.get("source")
    if record.scenario.get("reference") is True:
        return code(f"reference {imported}")
    return code(f"{imported} {record.sweep_id}") if imported else 0.0


def _settings(table: TrialTable, indices: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return a number for each trial, the same for those of one setting and source."""
    numbers: dict[bytes, int] = {}
    rows = np.column_stack([table.rows[indices], table.sources[indices]])
    alike = np.round(rows, 6) + 0.0  # -0.0 has other bytes than 0.0
    return np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in alike])


def _means(values: Array | Flags, settings: NDArray[np.intp]) -> Array:
    """Return the mean value of each setting, in the order of the settings' numbers."""
    _, indices = np.unique(settings, return_inverse=True)
    means: Array = np.bincount(indices.ravel(), weights=values) / np.bincount(indices.ravel())
    return means


def regrets_of(values: Array, metric: str) -> Array | None:
    """Return the regrets of one scenario's values of a metric, or None if all are NaN.

    NaN stands for a failed trial, whose regret is 1.
    """
    if np.isnan(values).all():
        return None
    sign = score_of(metric).sign
    return _regrets(sign * values, np.zeros(0), metric, float(np.nanmedian(sign * values)))[0]


def _regrets(scores: Array, bases: Array, metric: str, usual: float) -> tuple[Array, float, float]:
    """Return (regrets, spread, best); `usual` is the median score, each setting counted once."""
    best = float(np.nanmin(scores))
    # One absurd score must not make all others look equal; and a score worse than the untrained
    # model's counts as the worst.
    worst = min(float(np.nanmax(scores)), best + _WORST_OF_MEDIAN * (usual - best))
    base = bases[~np.isnan(bases)]
    if len(base) and best < float(np.median(base)):
        worst = min(worst, float(np.median(base)))
    measured = score_of(metric)
    share = 1.0 if measured.kind == "share" else abs(best)
    spread = max(worst - best, measured.least_spread * share, 1e-9)
    regrets = np.clip((scores - best) / spread, 0.0, 1.0)
    return np.where(np.isnan(scores), 1.0, regrets), spread, best


def _by_comparison(records: Sequence[TrialRecord], codes: Array) -> Array:
    """Return the codes of the trials' scenarios, others where other held-out tokens were scored.

    The trials of a scenario that compare with most of it keep its code.
    """
    found = codes.copy()
    told = (record.scenario.get("data") for record in records)
    digests = [data.get("eval_digest") if isinstance(data, dict) else None for data in told]
    by_code: dict[float, list[int]] = {}
    for index, value in enumerate(codes.tolist()):
        by_code.setdefault(value, []).append(index)
    for value, indices in by_code.items():
        if len({digests[index] for index in indices} - {None}) < 2:
            continue
        groups = comparison_groups([records[index] for index in indices], _OF_TOKENS)
        (usual, _), *_ = Counter(groups).most_common(1)
        for index, group in zip(indices, groups, strict=True):
            if group != usual:
                found[index] = code(f"{value} {group}")
    return found


def has_diverged(record: TrialRecord) -> bool:
    """Whether a trial failed because its loss diverged, which its setting is to blame for."""
    return record.status == "failed" and _DIVERGED.search(record.error or "") is not None


def _scores(record: TrialRecord, prefix: str) -> list[float]:
    """Return the scores, negated where more is better; NaN for anything but a sensible number."""
    found = []
    for name in score_names():
        value = record.metrics.get(prefix + name)
        sign = score_of(name).sign
        if isinstance(value, bool) or not isinstance(value, int | float):
            value = np.nan
        found.append(sign * float(value) if abs(value) <= _LARGEST else np.nan)
    return found
