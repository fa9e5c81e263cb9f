"""What to run for a scenario: candidates, predicted, and a few that cover for each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayfin.advisor import practice, quality
from rayfin.advisor.answer import Choice, Point, Predictions, Range, Recommendation
from rayfin.advisor.candidates import ScenarioFacts, candidates, given
from rayfin.advisor.feasible import Option, answers, nothing_fits, options_for
from rayfin.advisor.features import COLUMNS, setting_row
from rayfin.advisor.knowledge import Knowledge, knowledge_of
from rayfin.advisor.latency import first_token
from rayfin.advisor.process import Array, Parameters
from rayfin.advisor.rules import recommend_text, rule_for
from rayfin.advisor.wording import deployment, explanation, reasons, risks
from rayfin.config import Config
from rayfin.history import History
from rayfin.methods import METHODS, capacities

__all__ = ["LEARNED", "ScenarioFacts", "recommend"]

LEARNED = 0.3
"""Relevance from which trials decide, and the rules no longer do."""
_BASIS = 5
_NOT_IN_THE_RULE = 0.05
_LATER_IN_THE_RULE = 0.02
"""Charges of methods that the rules don't name, or name later: what settles a draw."""
_PER_DOUBLING = {"quality": 0.005, "cost": 0.05, "latency": 0.01}
"""Charge of twice the training time, by the scenario's priority."""
_PER_OCTAVE = 0.03
_OCTAVES_OF_METHOD = 2.0
_USUAL, _SAME = 0.4, 0.1
"""Decades within which a learning rate is about practice's, whose sources differ by as much; and
within which it is one that was tried."""
_UNMERGEABLE = {"quality": 0.0, "cost": 0.0, "latency": 0.1}
_MAY_NOT_FIT = 0.1
"""Charge of what the estimate of its memory leaves open; what does not fit is not chosen at all."""


def recommend(
    known: ScenarioFacts,
    history: History | Knowledge,
    k: int = 3,
    *,
    config: Config | None = None,
) -> Recommendation:
    """The k configurations to run in `known`, the best first; none where nothing fits there.

    `config` is what they are variants of: all that it was given is kept. Raises HistoryError where
    the history can't be read, and ConfigError where nothing can work with what was given.
    """
    knowledge = history if isinstance(history, Knowledge) else knowledge_of(history)
    base = config or Config()
    columns = _columns(known, knowledge.evidence)
    latency = first_token(known.facts, known.hardware, knowledge.served)
    every = options_for(candidates(base, known), known, knowledge.measured, latency, given(base))
    options = answers(every)
    rows = _rows(options or every, columns)
    near = knowledge.evidence.near(columns)
    relevances = _relevances(options or every, rows, near)
    relevance = float(relevances.max())
    learned = relevance >= LEARNED
    answer = Recommendation(
        source="learned" if learned else "rules",
        relevance=relevance,
        explanation=explanation(relevance, knowledge, columns, learned=learned),
        rule=recommend_text(known.scenario, "en"),
        scenario=known.scenario.as_dict(),
        trials=knowledge.trials,
        choices=[],
        nothing_fits=None,
        points=[],
    )
    if not options:
        said = nothing_fits(every, known, knowledge.measured, latency, base)
        return answer.model_copy(update={"nothing_fits": said})
    if not learned:  # trials that say next to nothing must not sway
        near = quality.Evidence({}, Parameters.expected(COLUMNS)).near(columns)
        relevances = np.zeros(len(options))
    tried = _tried(options, rows, near, known)
    options, rows, relevances = [options[at] for at in tried], rows[tried], relevances[tried]
    charges = quality.draws(near.process, rows)
    costs = _costs(options, known)
    costs += (1.0 - relevances) * _unusual(options, known)  # as far as trials leave it open
    chosen = quality.choose(charges, k, cost=costs)
    ranges = np.quantile(quality.draws(near.process, rows, measured=True), (0.1, 0.5, 0.9), axis=0)
    diverges = near.divergence(rows)
    rule = rule_for(known.scenario)
    alike = near.process.likeness(rows[chosen]) if learned else np.zeros((len(chosen), 0))

    def choice(number: int, at: int) -> Choice:
        option = options[at]
        candidate, taken = option.candidate, option.estimate
        low, middle, high = (float(value) for value in ranges[:, at])
        predictions = Predictions(
            shortfall=Range(low=low, expected=middle, high=high),
            divergence=float(diverges[at]) if learned else None,
            memory_bytes=_range(taken.memory),
            train_seconds=_range(taken.seconds),
            first_token_ms=latency,
        )
        basis = [
            knowledge.basis(int(near.trials[place_]), float(alike[number, place_]))
            for place_ in np.argsort(-alike[number], kind="stable")[:_BASIS]
        ]
        return Choice(
            rank=number + 1,
            method=candidate.method,
            settings=dict(candidate.settings),
            config=candidate.config.model_dump(mode="json"),
            predictions=predictions,
            feasibility=option.feasibility,
            trials=basis,
            reasons=reasons(candidate, rule, predictions, number, basis),
            risks=risks(candidate, rule, predictions, taken),
            deployment=deployment(candidate, known.scenario, rule),
        )

    return answer.model_copy(
        update={
            "choices": [choice(number, at) for number, at in enumerate(chosen)],
            "points": _points(options, charges.mean(axis=0)),
        }
    )


def _columns(known: ScenarioFacts, evidence: quality.Evidence) -> dict[str, float]:
    """The scenario's; what is not known of it, its samples' lengths say, its own trials tell."""
    columns = known.columns()
    group = evidence.groups.get(columns["group"])
    told = {} if group is None else dict(zip(COLUMNS.names, group.rows[0].tolist(), strict=True))
    return {
        name: told.get(name, value) if math.isnan(value) else value
        for name, value in columns.items()
    }


def _rows(options: Sequence[Option], scenario: Mapping[str, float]) -> Array:
    rows = []
    for option in options:
        setting = setting_row(option.candidate.config.model_dump(mode="json"))
        assert setting is not None  # a configuration that passed its checks
        values = {**scenario, **setting}
        rows.append([values[name] for name in COLUMNS.names])
    return np.array(rows, dtype=float)


def _relevances(options: Sequence[Option], rows: Array, near: quality.Near) -> Array:
    """For each, how much trials say about its method's settings: trials of one method are enough.

    Of several methods together they would say little, however much they say of the one.
    """
    methods = np.array([option.candidate.method for option in options])
    return quality.relevance(near.process, rows, methods)


def _tried(
    options: Sequence[Option], rows: Array, near: quality.Near, known: ScenarioFacts
) -> NDArray[np.intp]:
    """Places of those with about practice's learning rate, or with one among those of the trials.

    Beyond both nobody knows anything, so that such a rate would be proposed for its uncertainty
    alone. All where the rate was given.
    """
    column = COLUMNS.names.index("learning_rate")
    seen = near.process.observations.rows[:, column]
    least, most = np.nanmin(seen, initial=np.inf), np.nanmax(seen, initial=-np.inf)
    found = (rows[:, column] >= least - _SAME) & (rows[:, column] <= most + _SAME)
    for at, option in enumerate(options):
        rate = option.candidate.config.train.learning_rate
        usual = practice.learning_rate(option.candidate.method, known.scenario.model_size_b)
        found[at] |= abs(math.log10(rate / usual)) <= _USUAL
    return np.flatnonzero(found) if found.any() else np.arange(len(options))


def _costs(options: Sequence[Option], known: ScenarioFacts) -> Array:
    """What is added to the charges: for time, for what the rules prefer, for what may not fit."""
    scenario, methods = known.scenario, rule_for(known.scenario).methods
    seconds = np.array([option.estimate.seconds.expected for option in options])
    costs = _PER_DOUBLING[scenario.priority] * np.log2(seconds / seconds.min())
    for at, option in enumerate(options):
        method = option.candidate.method
        costs[at] += (
            _LATER_IN_THE_RULE * methods.index(method) if method in methods else _NOT_IN_THE_RULE
        )
        if not METHODS[method].merging:
            costs[at] += _UNMERGEABLE[scenario.priority]
        if option.feasibility.memory is None:
            costs[at] += _MAY_NOT_FIT
    found: Array = costs
    return found


def _unusual(options: Sequence[Option], known: ScenarioFacts) -> Array:
    """Charges for each octave away from practice's settings, and for methods named later."""
    found = [option.candidate for option in options]
    octaves, methods = np.zeros(len(found)), list(dict.fromkeys(one.method for one in found))
    counted = {"train.learning_rate", *(f"method.{name}" for name in capacities())}
    for at, option in enumerate(found):
        octaves[at] = _OCTAVES_OF_METHOD * methods.index(option.method)
        for name, value in practice.settings(known.scenario, option.method).items():
            taken = option.settings.get(name)
            if name in counted and taken is not None:
                octaves[at] += abs(math.log2(taken / value))
    charges: Array = _PER_OCTAVE * octaves
    return charges


def _range(interval: Any) -> Range:
    return Range(low=interval.low, expected=interval.expected, high=interval.high)


def _points(options: Sequence[Option], charges: Array) -> list[Point]:
    """All that fit, the Pareto front of shortfall and training time marked."""
    seconds = [option.estimate.seconds.expected for option in options]
    best, front = math.inf, set()
    for at in sorted(range(len(options)), key=lambda at: (seconds[at], charges[at])):
        if charges[at] < best:
            best = float(charges[at])
            front.add(at)
    return [
        Point(
            method=option.candidate.method,
            settings={
                name: value
                for name, value in option.candidate.settings.items()
                if name == "train.learning_rate" or name.startswith("method.")
            },
            shortfall=float(charges[at]),
            train_seconds=seconds[at],
            memory_bytes=option.estimate.memory.expected,
            front=at in front,
        )
        for at, option in enumerate(options)
    ]
