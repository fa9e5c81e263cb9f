"""What to run for a scenario: candidates, predicted, and a few that cover for each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayfin.config import Config
from rayfin.hardware import Hardware
from rayfin.history import History
from rayfin.methods import METHODS
from rayfin.models.facts import ModelFacts
from rayfin.recommend import practice, quality
from rayfin.recommend.answer import (
    Basis,
    Choice,
    Feasibility,
    Point,
    Predictions,
    Range,
    Recommendation,
)
from rayfin.recommend.candidates import Candidate, candidates
from rayfin.recommend.estimate import Estimate, estimate
from rayfin.recommend.features import COLUMNS, data_row, model_row, place_codes, setting_row
from rayfin.recommend.knowledge import Knowledge, knowledge_of
from rayfin.recommend.latency import first_token
from rayfin.recommend.process import Array
from rayfin.recommend.rules import Rule, recommend_text, rule_for
from rayfin.recommend.scenario import Scenario

LEARNED = 0.3
"""Relevance from which trials decide, and the rules no longer do."""
_BASIS = 5
_NOT_IN_THE_RULE = 0.05
_LATER_IN_THE_RULE = 0.02
"""Charges of methods that the rules don't name, or name later: what settles a draw."""
_PER_DOUBLING = {"quality": 0.005, "cost": 0.05, "latency": 0.01}
"""Charge of twice the training time, by the scenario's priority."""
_PER_OCTAVE = 0.03
_OCTAVES = ("train.learning_rate", "method.r", "method.target_r", "method.num_virtual_tokens")
_OCTAVES_OF_METHOD = 2.0
_UNMERGEABLE = {"quality": 0.0, "cost": 0.0, "latency": 0.1}
_MISSES = 10.0
"""Charge of what does not fit the memory, the budget or the latency: chosen where nothing fits."""


@dataclass(frozen=True)
class Place:
    """What a recommendation is for: the scenario, and the facts that its predictions need."""

    scenario: Scenario
    facts: ModelFacts
    hardware: Hardware
    profile: Mapping[str, Any] | None = None
    """Of the data, as records hold it; what is not known of it may be missing."""

    def columns(self) -> dict[str, float]:
        """Those of the scenario, in the learned model's rows."""
        name = self.facts.identity
        return (
            model_row(name, self.facts.as_dict())
            | data_row(self.profile or {"rows_train": self.scenario.dataset_rows})
            | place_codes(self.profile or {}, name)
        )


def recommend(
    place: Place, history: History | Knowledge, k: int = 3, *, config: Config | None = None
) -> Recommendation:
    """The k configurations to run in `place`, the best first.

    `config` is what they are variants of: all that it was given is kept. Raises HistoryError where
    the history can't be read, and ConfigError where nothing can work with what was given.
    """
    knowledge = history if isinstance(history, Knowledge) else knowledge_of(history)
    options = candidates(config or Config(), place.scenario)
    columns = _columns(place, knowledge.evidence)
    rows = _rows(options, columns)
    near = knowledge.evidence.near(columns)
    relevances = _relevances(options, rows, near)
    relevance = float(relevances.max())
    learned = relevance >= LEARNED
    if not learned:  # trials that say next to nothing must not sway
        near = quality.Evidence({}, knowledge.evidence.parameters).near(columns)
    estimates = _estimates(options, place, knowledge)
    charges = quality.draws(near.process, rows)
    costs = _costs(options, estimates, place)
    costs += (1.0 - relevances) * _unusual(options, place)  # as far as trials leave it open
    chosen = quality.choose(charges, k, cost=costs)
    ranges = np.quantile(quality.draws(near.process, rows, measured=True), (0.1, 0.5, 0.9), axis=0)
    latency = first_token(place.facts, place.hardware, knowledge.served)
    diverges = near.divergence(rows)
    rule = rule_for(place.scenario)
    alike = near.process.likeness(rows[chosen]) if learned else np.zeros((len(chosen), 0))

    def choice(number: int, at: int) -> Choice:
        option, taken = options[at], estimates[at]
        low, middle, high = (float(value) for value in ranges[:, at])
        predictions = Predictions(
            shortfall=Range(low=low, expected=middle, high=high),
            divergence=float(diverges[at]),
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
            method=option.method,
            settings=dict(option.settings),
            config=option.config.model_dump(mode="json"),
            predictions=predictions,
            feasibility=_feasibility(predictions, taken, place.scenario),
            trials=basis,
            reasons=_reasons(option, rule, predictions, number, basis),
            risks=_risks(option, rule, predictions, taken),
            deployment=_deployment(option, place.scenario, rule),
        )

    return Recommendation(
        source="learned" if learned else "rules",
        relevance=relevance,
        explanation=_explanation(relevance, knowledge, learned=learned),
        rule=recommend_text(place.scenario, "en"),
        scenario=place.scenario.as_dict(),
        trials=knowledge.trials,
        choices=[choice(number, at) for number, at in enumerate(chosen)],
        points=_points(options, charges.mean(axis=0), estimates),
    )


def _columns(place: Place, evidence: quality.Evidence) -> dict[str, float]:
    """The scenario's; what is not known of it, its samples' lengths say, its own trials tell."""
    columns = place.columns()
    group = evidence.groups.get(columns["group"])
    told = {} if group is None else dict(zip(COLUMNS.names, group.rows[0].tolist(), strict=True))
    return {
        name: told.get(name, value) if math.isnan(value) else value
        for name, value in columns.items()
    }


def _rows(options: Sequence[Candidate], scenario: Mapping[str, float]) -> Array:
    rows = []
    for option in options:
        setting = setting_row(option.config.model_dump(mode="json"))
        assert setting is not None  # a configuration that passed its checks
        values = {**scenario, **setting}
        rows.append([values[name] for name in COLUMNS.names])
    return np.array(rows, dtype=float)


def _relevances(options: Sequence[Candidate], rows: Array, near: quality.Near) -> Array:
    """For each, how much trials say about its method's settings: trials of one method are enough.

    Of several methods together they would say little, however much they say of the one.
    """
    methods = np.array([option.method for option in options])
    return quality.relevance(near.process, rows, methods)


def _estimates(
    options: Sequence[Candidate], place: Place, knowledge: Knowledge
) -> Sequence[Estimate]:
    """Of every candidate; those that differ in the learning rate alone take the same."""
    known: dict[str, Estimate] = {}
    found = []
    for option in options:
        train = option.config.train.model_copy(update={"learning_rate": 1.0})
        key = f"{option.config.method.model_dump_json()} {train.model_dump_json()}"
        if key not in known:
            known[key] = estimate(
                option.config,
                place.facts,
                place.hardware,
                measured=knowledge.measured,
                tokens=place.scenario.sequence_length,
            )
        found.append(known[key])
    return found


def _costs(options: Sequence[Candidate], estimates: Sequence[Estimate], place: Place) -> Array:
    """What is added to the charges: for time, for what the rules prefer, for what does not fit."""
    scenario, methods = place.scenario, rule_for(place.scenario).methods
    seconds = np.array([taken.seconds.expected for taken in estimates])
    costs = _PER_DOUBLING[scenario.priority] * np.log2(seconds / seconds.min())
    for at, (option, taken) in enumerate(zip(options, estimates, strict=True)):
        named = option.method in methods
        costs[at] += (
            _LATER_IN_THE_RULE * methods.index(option.method) if named else _NOT_IN_THE_RULE
        )
        if not METHODS[option.method].merging:
            costs[at] += _UNMERGEABLE[scenario.priority]
        late = _budget(taken, scenario) is False
        costs[at] += _MISSES * ((taken.fits is False) + late)
    found: Array = costs
    return found


def _unusual(options: Sequence[Candidate], place: Place) -> Array:
    """Charges for each octave away from practice's settings, and for methods named later."""
    octaves, methods = np.zeros(len(options)), list(dict.fromkeys(o.method for o in options))
    for at, option in enumerate(options):
        octaves[at] = _OCTAVES_OF_METHOD * methods.index(option.method)
        for name, value in practice.settings(place.scenario, option.method).items():
            taken = option.settings.get(name)
            if name in _OCTAVES and taken is not None:
                octaves[at] += abs(math.log2(taken / value))
    charges: Array = _PER_OCTAVE * octaves
    return charges


def _budget(taken: Estimate, scenario: Scenario) -> bool | None:
    return _within(_range(taken.seconds), _seconds(scenario.budget_hours))


def _seconds(hours: float | None) -> float | None:
    return None if hours is None else 3600 * hours


def _within(value: Range, limit: float | None) -> bool | None:
    if limit is None:
        return None
    return True if value.high <= limit else False if value.low > limit else None


def _feasibility(predictions: Predictions, taken: Estimate, scenario: Scenario) -> Feasibility:
    return Feasibility(
        memory=taken.fits,
        budget=_budget(taken, scenario),
        latency=_within(predictions.first_token_ms, scenario.latency_target_ms),
    )


def _range(interval: Any) -> Range:
    return Range(low=interval.low, expected=interval.expected, high=interval.high)


def _explanation(relevance: float, knowledge: Knowledge, *, learned: bool) -> str:
    trials = f"{knowledge.trials} trials of the history and {knowledge.reference} of the reference"
    if learned:
        return (
            f"learned from {trials}, which take away {relevance:.0%} of the doubt about which "
            "settings are better here"
        )
    return (
        f"the rules: {trials} say next to nothing about this scenario (they take away "
        f"{relevance:.0%} of the doubt about which settings are better)"
    )


def _reasons(
    option: Candidate, rule: Rule, predictions: Predictions, number: int, basis: Sequence[Basis]
) -> list[str]:
    found = []
    if number:
        found.append("covers for where those before it go wrong")
    if option.method in rule.methods:
        found.append(rule.reason)
    if basis and basis[0].likeness > 0.5:
        found.append(f"much like trial {basis[0].trial_id}: {basis[0].summary}")
    if predictions.shortfall.high < 0.25:
        found.append("expected near the best known, with little doubt")
    return found


def _risks(option: Candidate, rule: Rule, predictions: Predictions, taken: Estimate) -> list[str]:
    found = [rule.risk] if rule.risk and option.method in rule.methods else []
    if predictions.divergence >= 0.1:
        found.append(f"{predictions.divergence:.0%} of settings like it diverge")
    if predictions.shortfall.high - predictions.shortfall.low > 0.5:
        found.append("little is known of such settings here: its interval is wide")
    if taken.fits is not True:
        found.append(
            "does not fit the device's memory"
            if taken.fits is False
            else "may not fit the device's memory"
        )
    return found


def _deployment(option: Candidate, scenario: Scenario, rule: Rule) -> str:
    method = METHODS[option.method]
    if scenario.latency == "strict" and scenario.hardware == "multi_gpu":
        return rule.deployment
    if option.method == "full":
        return "a base model of its own"
    if option.config.method.quantization_bit == 4:
        return "beside other adapters on the 4-bit base (engine.quantization_bit=4)"
    if scenario.latency == "strict" and method.merging:
        return "merged into its base model, or an adapter in a shared deployment"
    return "an adapter in a shared deployment, switched per request"


def _points(
    options: Sequence[Candidate], charges: Array, estimates: Sequence[Estimate]
) -> list[Point]:
    """All candidates, the Pareto front of shortfall and training time marked."""
    seconds = [taken.seconds.expected for taken in estimates]
    best, front = math.inf, set()
    for at in sorted(range(len(options)), key=lambda at: (seconds[at], charges[at])):
        if charges[at] < best:
            best = float(charges[at])
            front.add(at)
    return [
        Point(
            method=option.method,
            settings={
                name: value
                for name, value in option.settings.items()
                if name == "train.learning_rate" or name.startswith("method.")
            },
            shortfall=float(charges[at]),
            train_seconds=seconds[at],
            memory_bytes=estimates[at].memory.expected,
            front=at in front,
        )
        for at, option in enumerate(options)
    ]
