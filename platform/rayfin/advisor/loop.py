"""A sweep's advisor: it starts from what past trials say, and learns from the sweep's own.

Two processes look at the sweep's trials: one that has seen the nearest trials of the past, and one
that knows what practice expects and nothing else. Each counts for as much as it made the sweep's
own results likely (Bayesian model averaging), so that a past that misleads is left behind after a
few trials. The next trial is the one that is expected to improve most on the best so far, where
those that still run count with what they may come to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayfin.advisor import quality
from rayfin.advisor.features import (
    COLUMNS,
    data_row,
    model_row,
    octaves,
    place_codes,
    setting_row,
)
from rayfin.advisor.knowledge import Knowledge, knowledge_of
from rayfin.advisor.process import Array, Observations, Parameters, Process
from rayfin.advisor.recommendation import LEARNED
from rayfin.advisor.table import charges_of
from rayfin.errors import ConfigError
from rayfin.history import History
from rayfin.methods import capacities
from rayfin.models import describe_model
from rayfin.tuning.plan import SweepPlan
from rayfin.tuning.search import EndedTrial
from rayfin.tuning.space import SearchSpace

_PAST_ODDS, _HALVED_AFTER = 6.0, 2.0
"""How much likelier the past is taken to hold than not, before the sweep's first trial, and own
trials after which that is half: what a right past knows is found by then."""
_SPREADS = (1.0, 2.0, 4.0, 8.0, 16.0)
_LEAST_SHARE = 0.01
"""Views that are less likely than this are not asked."""
_STEPS = COLUMNS.names.index("steps")
_ASKED = 64
"""Points of the space by which the past's relevance is judged."""


def sweep_advisor(plan: SweepPlan, history: History) -> SweepAdvisor | None:
    """The advisor of a sweep.

    None where sweep.search is auto, and the past says next to nothing, or the sweep has axes that
    the advisor does not know. Raises ConfigError for those where it was asked for.
    """
    sweep = plan.config.sweep
    known = _known_axes()
    unknown = sorted(sweep.parameters.keys() - known)
    if unknown and sweep.search == "advisor":
        raise ConfigError(
            f"sweep.search=advisor: it learns nothing about sweep.parameters.{unknown[0]}, only "
            f"about {', '.join(sorted(known))}; use sweep.search=tpe, or leave the axis out"
        )
    if unknown:
        return None
    advisor = SweepAdvisor(_past(plan, history), scenario_of(plan), sweep.metric, seed=sweep.seed)
    if sweep.search == "auto" and advisor.relevance(plan.space) < LEARNED:
        return None
    return advisor


def _known_axes() -> set[str]:
    """Settings that are columns of the learned model."""
    return {
        *("train.learning_rate", "train.per_device_train_batch_size", "train.max_steps"),
        *("train.gradient_accumulation_steps", "method.type"),
        *(f"method.{name}" for name in (*capacities(), "lora_alpha", "lora_dropout")),
    }


def _past(plan: SweepPlan, history: History) -> Knowledge:
    """What is known but for the sweep's own trials, which a resumed one is told of besides.

    Seen twice, they would prove the past right, whatever it says.
    """
    if not history.trials(sweep_id=plan.sweep_id, limit=1):
        return knowledge_of(history)
    return Knowledge.of(row for row in history.trials() if row.sweep_id != plan.sweep_id)


def scenario_of(plan: SweepPlan) -> dict[str, float]:
    """The columns of a sweep's scenario; its own trials are a group beside those of the past."""
    config = plan.config
    corpus, facts = plan.corpus(config.data), describe_model(config.model)
    profile = {"rows_train": len(corpus.train), "source": corpus.source}
    return (
        model_row(facts.identity, facts.as_dict())
        | data_row(profile)
        | place_codes(profile, facts.identity, otherwise=f"sweep {plan.sweep_id}")
    )


class SweepAdvisor:
    """Chooses a sweep's next trial; see `rayfin.tuning.search.Advisor`."""

    def __init__(
        self, knowledge: Knowledge, scenario: Mapping[str, float], metric: str, *, seed: int = 0
    ) -> None:
        self._scenario, self._metric = scenario, metric
        evidence = knowledge.evidence
        self._past = evidence.near(scenario).process
        self._seed = seed

    def relevance(self, space: SearchSpace) -> float:
        """How much the past says about the sweep's own points; see `Near.relevance`."""
        from random import Random

        random = Random(0)
        specs = [space.spec_of(space.drawn(random)).model_dump(mode="json") for _ in range(_ASKED)]
        return float(quality.relevance(self._past, self._rows(specs)).mean())

    def choose(
        self,
        options: Sequence[Mapping[str, Any]],
        ended: Sequence[EndedTrial],
        running: Sequence[Mapping[str, Any]],
    ) -> int:
        rows = self._rows(options)
        # The ended ones as whole trials: what counts is what such a setting comes to.
        taken = self._rows([*(one.spec for one in ended), *running])
        known, charges = self._charges(ended)
        views = _views(_fresh(), known, charges)
        if len(self._past.observations):
            odds = _PAST_ODDS / (1.0 + len(known) / _HALVED_AFTER)
            views += _views(self._past, known, charges, math.log(odds))
        seed = 10_000 * self._seed + len(taken)  # a resumed sweep draws as a whole one does
        gain = np.zeros(len(rows))
        for view, share in _shares(views):
            draws = quality.draws(view.process, np.concatenate([rows, taken]), seed=seed)
            best = draws[:, len(rows) :].min(axis=1, initial=1.0)
            better = np.maximum(best[:, None] - draws[:, : len(rows)], 0.0).mean(axis=0)
            # Where nothing promises to be better, the best of what is left.
            better -= 1e-6 * draws[:, : len(rows)].mean(axis=0)
            gain += share * view.multiple * better
        return int(gain.argmax())

    def _charges(self, ended: Sequence[EndedTrial]) -> tuple[Array, Array]:
        """The sweep's own trials, as rows and charges; none before they can be compared.

        Those that the history answered are of the past.
        """
        own = [one for one in ended if not one.recalled]
        rows = self._rows([one.spec for one in own])
        # A trial that was stopped early was so good by then.
        rows[:, _STEPS] = np.fmin(rows[:, _STEPS], [octaves(one.steps) for one in own])
        values = np.array([np.nan if one.value is None else one.value for one in own])
        charges = charges_of(values, self._metric) if len(own) > 1 else None
        return (rows[:0], values[:0]) if charges is None else (rows, charges)

    def _rows(self, specs: Sequence[Mapping[str, Any]]) -> Array:
        rows = []
        for spec in specs:
            setting = setting_row(spec) or dict.fromkeys(COLUMNS.setting, math.nan)
            values = {**self._scenario, **setting}
            rows.append([values.get(name, math.nan) for name in COLUMNS.names])
        return np.array(rows, dtype=float).reshape(len(rows), len(COLUMNS.names))


def _fresh() -> Process:
    return Process(COLUMNS, Parameters.expected(COLUMNS), Observations.none(COLUMNS))


@dataclass(frozen=True)
class _View:
    """A process that has seen the sweep's own trials, and what it takes their spread to be."""

    process: Process
    likelihood: float
    """Of those trials before they were seen, and of the view itself, as a logarithm."""
    multiple: float
    """Of the spread that they have shown so far: what a charge of 1 is taken to be."""


def _views(process: Process, rows: Array, charges: Array, odds: float = 0.0) -> list[_View]:
    """`process` with the sweep's own trials in it, and how likely they made each view of them.

    The worst that they could come to has not been seen yet: the spread of their scores may be any
    multiple of what it is so far. `odds`: logarithm of how likely the process is beside others.
    """
    if not len(charges):
        return [_View(process, odds, 1.0)]
    before = process.evidence()
    views = []
    for multiple in _SPREADS:
        with_own = quality.joined(process, quality.observed(rows, charges / multiple))
        likelihood = with_own.evidence() - before - len(charges) * math.log(multiple)
        views.append(_View(with_own, odds + likelihood, multiple))
    return views


def _shares(views: Sequence[_View]) -> Iterator[tuple[_View, float]]:
    """Each view that counts, with its probability."""
    most = max(view.likelihood for view in views)
    weights = [math.exp(view.likelihood - most) for view in views]
    for view, weight in zip(views, weights, strict=True):
        if (share := weight / sum(weights)) >= _LEAST_SHARE:
            yield view, share
