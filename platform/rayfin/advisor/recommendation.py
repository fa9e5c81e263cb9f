"""Recommend what to run in a scenario: predict candidates, and choose a few that complement each
other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayfin.advisor import practice
from rayfin.advisor.alternatives import alternatives
from rayfin.advisor.answer import (
    Choice,
    PredictionInterval,
    Predictions,
    Recommendation,
)
from rayfin.advisor.candidates import (
    ScenarioFacts,
    candidates,
    given_settings,
    preferred_methods,
)
from rayfin.advisor.commands import training_command
from rayfin.advisor.doubted import doubt_notes, doubted_trials
from rayfin.advisor.feasibility import AssessedCandidate, assess_candidates, feasible, nothing_fits
from rayfin.advisor.features import CAPACITIES, COLUMNS, RATES, setting_row, unlearned
from rayfin.advisor.kernel import Array, Hyperparameters
from rayfin.advisor.knowledge import Knowledge, knowledge_of
from rayfin.advisor.latency import first_token
from rayfin.advisor.preferences import (
    preference_costs,
    unknown_latency,
    why_unchanged,
    without_each,
)
from rayfin.advisor.quality_model import (
    LEARNED,
    QualityModel,
    ScenarioPosterior,
    choose_complementary,
    regret_quantiles,
    relevance,
    sample_regrets,
)
from rayfin.advisor.rules import recommend_text, rule_for
from rayfin.advisor.scenario import Scenario
from rayfin.advisor.steps import cut_risk, length_notes
from rayfin.advisor.trade_offs import trade_offs
from rayfin.advisor.wording import deployment, explanation, reasons, risks
from rayfin.config import Config, format_value
from rayfin.errors import ConfigError
from rayfin.history import History
from rayfin.language import current_language
from rayfin.methods import capacities

__all__ = ["ScenarioFacts", "recommend"]

_SUPPORTING = 5
_PER_OCTAVE = 0.03
_OCTAVES_OF_METHOD = 2.0
_USUAL, _SAME = 0.4, 0.1
"""The decades within which a learning rate counts as practice's, whose sources differ by as much,
and within which it counts as one that was tried."""


def recommend(
    known: ScenarioFacts,
    history: History | Knowledge,
    k: int = 3,
    *,
    config: Config | None = None,
) -> Recommendation:
    """Return the k configurations to run in a scenario, the best first; none where nothing fits.

    They are variants of `config`, whose given settings they keep. Raises HistoryError where the
    history can't be read, and ConfigError where nothing can work with the given settings.
    """
    knowledge = history if isinstance(history, Knowledge) else knowledge_of(history)
    base = config or Config()
    if (other := unlearned(base.train.model_dump(mode="json"))) is not None:
        raise ConfigError(
            f"train.{other}={format_value(getattr(base.train, other))}: the advisor knows trials "
            f"of AdamW as it comes, whose rates don't suit it; leave train.{other} out"
        )
    _check_known(given_settings(base))
    columns = _columns(known, knowledge.quality_model)
    latency = first_token(known.facts, known.hardware, knowledge.served)
    every = assess_candidates(
        candidates(base, known), known, knowledge.measured, latency, given_settings(base)
    )
    options = feasible(every)
    rows = _rows(options or every, columns)
    posterior = knowledge.quality_model.posterior(columns)
    rows = _of_tried_lengths(rows, posterior)
    doubted = doubted_trials(knowledge, posterior, columns)
    relevances = _relevances(options or every, rows, posterior)
    most = float(relevances.max())
    learned = most >= LEARNED and posterior.knows(columns)
    answer = Recommendation(
        lang=current_language(),
        source="learned" if learned else "rules",
        relevance=most,
        explanation=explanation(most, knowledge, columns, learned=learned),
        notes=[*known.notes, *doubt_notes(doubted)],
        doubted=doubted,
        rule=recommend_text(known.scenario, current_language()),
        scenario=known.scenario.as_dict(),
        trials=knowledge.trials,
        choices=[],
        nothing_fits=None,
        alternatives=[],
        points=[],
    )
    ruled = every if learned else _of_the_rules(every, known, base)
    if not feasible(ruled):
        said = nothing_fits(ruled, known, knowledge.measured, latency, base)
        return answer.model_copy(update={"nothing_fits": said})
    if not learned:  # trials that say next to nothing must not sway
        posterior = QualityModel({}, Hyperparameters.expected(COLUMNS)).posterior(columns)
        relevances = np.zeros(len(options))
    tried = _tried(options, rows, posterior, known)
    options, rows, relevances = [options[at] for at in tried], rows[tried], relevances[tried]
    regrets = sample_regrets(posterior.process, rows)
    predicted = regrets, posterior.past_regrets(rows), posterior.relative
    unusual = (1.0 - relevances) * _unusual(options, known)  # as far as trials leave it open

    def choose(scenario: Scenario) -> list[int]:
        costs = preference_costs(options, scenario) + unusual
        return _choose(predicted, costs, options, k, None if learned else scenario)

    chosen = choose(known.scenario)
    fixed = given_settings(base)
    notes = [*length_notes(known.rows, fixed), *unknown_latency(known.scenario, latency)]
    cuts = [
        cut_risk(options[at].candidate.config.train.model_dump(), known.rows, fixed)
        for at in chosen
    ]
    for what, without in without_each(known.scenario):
        shortened = what.startswith("budget") and any(cuts)
        if choose(without) == chosen and not shortened:
            notes.append(why_unchanged(what, [options[at] for at in chosen]))
    ranges = regret_quantiles(posterior.process, rows, (0.1, 0.5, 0.9))
    diverges = posterior.divergence(rows)
    rule = rule_for(known.scenario)
    similar = posterior.process.similarity(rows[chosen])
    weights = posterior.weights(rows[chosen])

    def choice(number: int, at: int) -> Choice:
        option = options[at]
        candidate, taken = option.candidate, option.estimate
        low, middle, high = (float(value) for value in ranges[:, at])
        predictions = Predictions(
            shortfall=PredictionInterval(low=low, expected=middle, high=high),
            divergence=float(diverges[at]) if learned else None,
            memory_bytes=_interval(taken.memory),
            steps=taken.steps,
            train_seconds=_interval(taken.seconds),
            first_token_ms=latency,
        )
        supporting = [
            knowledge.supporting_trial(
                int(posterior.trials[index]),
                float(weights[number, index]),
                float(similar[number, index]),
            )
            for index in np.argsort(-weights[number], kind="stable")[:_SUPPORTING]
        ]
        return Choice(
            rank=number + 1,
            method=candidate.method,
            settings=dict(candidate.settings),
            config=(whole := _as_written(candidate.config)),
            command=training_command(whole),
            predictions=predictions,
            feasibility=option.feasibility,
            trials=supporting,
            reasons=reasons(candidate, rule, predictions, number, supporting),
            risks=[*filter(None, cuts[number : number + 1]), *risks(candidate, rule, predictions)],
            deployment=deployment(candidate, known.scenario, rule),
        )

    return answer.model_copy(
        update={
            "choices": [choice(number, at) for number, at in enumerate(chosen)],
            "notes": [*answer.notes, *notes],
            "alternatives": alternatives(options[chosen[0]].candidate, base, known),
            "points": trade_offs(options, ranges[1]),
        }
    )


def _of_the_rules(
    options: Sequence[AssessedCandidate], known: ScenarioFacts, base: Config
) -> Sequence[AssessedCandidate]:
    """Return the options of the rules' methods, which alone may be first where no trial tells.

    Where a method was given, or none of theirs can work with what was given, all are returned.
    """
    preferred = preferred_methods(known.scenario)
    found = [option for option in options if option.candidate.method in preferred]
    return options if "method.type" in given_settings(base) or not found else found


def _check_known(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for a given setting with which no trial can have run."""
    ranges = {
        "train.learning_rate": RATES,
        **{f"method.{name}": CAPACITIES for name in capacities()},
    }
    for name, (least, most) in ranges.items():
        value = given.get(name)
        if value is not None and not least <= value <= most:
            raise ConfigError(
                f"{name}={format_value(value)}: the advisor knows values from {least:g} to "
                f"{most:g}; give one of them, or leave {name} out"
            )


def _columns(known: ScenarioFacts, model: QualityModel) -> dict[str, float]:
    """Return the scenario's columns; unknown ones are filled in from its own trials, if any."""
    columns = known.columns()
    group = model.groups.get(columns["group"])
    told = {} if group is None else dict(zip(COLUMNS.names, group.rows[0].tolist(), strict=True))
    return {
        name: told.get(name, value) if math.isnan(value) else value
        for name, value in columns.items()
    }


def _rows(options: Sequence[AssessedCandidate], scenario: Mapping[str, float]) -> Array:
    rows = []
    for option in options:
        setting = setting_row(option.candidate.config.model_dump(mode="json"))
        assert setting is not None  # a configuration that passed its checks
        values = {**scenario, **setting}
        rows.append([values[name] for name in COLUMNS.names])
    return np.array(rows, dtype=float)


def _of_tried_lengths(rows: Array, posterior: ScenarioPosterior) -> Array:
    """Return candidates' rows with the steps of the nearest length that trials had.

    Which settings are better is taken to be as in the longest trials where an advised training is
    longer than any of them, and as in the shortest where it is shorter.
    """
    column = COLUMNS.names.index("steps")
    seen = posterior.process.observations.rows[:, column]
    seen = seen[np.isfinite(seen)]
    if seen.size:
        rows = rows.copy()
        rows[:, column] = rows[:, column].clip(seen.min(), seen.max())
    return rows


def _relevances(
    options: Sequence[AssessedCandidate], rows: Array, posterior: ScenarioPosterior
) -> Array:
    """Return how much trials say about the settings of each candidate's own method.

    Trials of one method are enough: about all methods together they would say little.
    """
    methods = np.array([option.candidate.method for option in options])
    return relevance(posterior.process, rows, methods)


def _tried(
    options: Sequence[AssessedCandidate],
    rows: Array,
    posterior: ScenarioPosterior,
    known: ScenarioFacts,
) -> NDArray[np.intp]:
    """Return the indices of candidates with about practice's learning rate, or a rate that was
    tried.

    Nothing is known about others, which would be proposed for their uncertainty alone. Where no
    candidate has such a rate, as the rate was given, all are returned.
    """
    column = COLUMNS.names.index("learning_rate")
    seen = posterior.process.observations.rows[:, column]
    least, most = np.nanmin(seen, initial=np.inf), np.nanmax(seen, initial=-np.inf)
    found = (rows[:, column] >= least - _SAME) & (rows[:, column] <= most + _SAME)
    for at, option in enumerate(options):
        rate = option.candidate.config.train.learning_rate
        usual = practice.learning_rate(option.candidate.method, known.scenario.model_size_b)
        found[at] |= abs(math.log10(rate / usual)) <= _USUAL
    return np.flatnonzero(found) if found.any() else np.arange(len(options))


def _unusual(options: Sequence[AssessedCandidate], known: ScenarioFacts) -> Array:
    """Return what is added to the regrets for each octave away from practice's settings."""
    found, r = [option.candidate for option in options], known.rank
    octaves, methods = np.zeros(len(found)), list(dict.fromkeys(one.method for one in found))
    counted = {"train.learning_rate", *(f"method.{name}" for name in capacities())}
    for at, option in enumerate(found):
        octaves[at] = _OCTAVES_OF_METHOD * methods.index(option.method)
        for name, value in practice.settings(known.scenario, option.method, r).items():
            taken = option.settings.get(name)
            if name in counted and taken is not None:
                octaves[at] += abs(math.log2(taken / value))
    regrets: Array = _PER_OCTAVE * octaves
    return regrets


def _choose(
    predicted: tuple[Array, Array, bool],
    costs: Array,
    options: Sequence[AssessedCandidate],
    k: int,
    by_rules: Scenario | None,
) -> list[int]:
    """Return the indices of k options that cover for each other; `by_rules` by the rules' methods.

    Of those that differ in capacity or precision alone the best one is taken, as the difference is
    small beside that of another rate or method; the others only where nothing else is left.
    `predicted` are samples of the options' regrets, those in past scenarios, and whether one of
    them is a relative of this one.
    """
    regrets, past, relative = predicted
    order = np.argsort(regrets.mean(axis=0) + costs, kind="stable").tolist()
    preferred = () if by_rules is None else preferred_methods(by_rules)
    kinds: dict[tuple[str, float], int] = {}
    for at in order:
        option = options[at].candidate
        kind = "lora" if option.method == "qlora" else option.method
        if not preferred or option.method in preferred:
            kinds.setdefault((kind, option.config.train.learning_rate), at)
    best = sorted(kinds.values()) or order
    found = choose_complementary(regrets[:, best], k, costs[best], past[:, best], relative=relative)
    chosen = [best[at] for at in found]
    rest = [at for at in order if at not in best]
    return chosen + rest[: k - len(chosen)]


def _as_written(config: Config) -> dict[str, Any]:
    """Return the whole configuration without the steps that follow from its epochs."""
    found = config.model_dump(mode="json")
    if config.train.num_train_epochs is not None:
        found["train"]["max_steps"] = None
    return found


def _interval(interval: Any) -> PredictionInterval:
    return PredictionInterval(low=interval.low, expected=interval.expected, high=interval.high)
