"""Choose the trials of a sweep, from past trials and from the sweep's own results.

Two Gaussian processes are averaged: one conditioned on the most related trials of the past, and one
that knows only what practice expects. Each is weighted by how likely it made the sweep's own
results (Bayesian model averaging), so that a misleading past loses its weight after a few trials.
The next trial is the one with the largest expected improvement on the best so far, where running
trials count with what they may come to. The first trials are of different methods or learning
rates, in which settings differ most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayfin.advisor.features import (
    COLUMNS,
    category_codes,
    data_row,
    model_row,
    octaves,
    setting_row,
    unlearned,
)
from rayfin.advisor.gaussian_process import GaussianProcess, Observations
from rayfin.advisor.kernel import Array, Hyperparameters
from rayfin.advisor.knowledge import Knowledge, knowledge_of
from rayfin.advisor.quality_model import (
    LEARNED,
    conditioned_on,
    regret_observations,
    relevance,
    sample_regrets,
)
from rayfin.advisor.trial_table import regrets_of
from rayfin.errors import ConfigError
from rayfin.history import History
from rayfin.methods import capacities
from rayfin.models import describe_model
from rayfin.objectives import objective_of
from rayfin.tuning.plan import SweepPlan
from rayfin.tuning.search import EndedTrial
from rayfin.tuning.space import SearchSpace

_PAST_ODDS, _HALVED_AFTER = 6.0, 2.0
"""The prior odds that the past holds, and the number of the sweep's own trials that halves them:
by then, what a right past knows has been found."""
_SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)
_MIN_PROBABILITY = 0.01
"""Models with a smaller probability than this are ignored."""
_SPREAD_TRIALS = 4
"""The number of first trials of which no two have about the same method and learning rate."""
_SAME = {"learning_rate": 0.1, "method_x": 0.3, "method_y": 0.3}
"""The decades, and the distance of methods' coordinates (of LoRA and QLoRA, say), within which
settings have about the same."""
_STEPS = COLUMNS.names.index("steps")
_POINTS_JUDGED = 64
"""The number of points of the space by which the relevance of the past is judged."""


def advisor_for_sweep(plan: SweepPlan, history: History) -> SweepAdvisor | None:
    """Return the advisor of a sweep.

    With sweep.search=auto it is None where past trials say next to nothing, or where the sweep has
    axes that the advisor does not know; with sweep.search=advisor, such axes raise ConfigError.
    """
    sweep = plan.config.sweep
    known = _known_axes()
    unknown = sorted(sweep.parameters.keys() - known)
    if unknown and sweep.search == "advisor":
        raise ConfigError(
            f"sweep.search=advisor: it learns nothing about sweep.parameters.{unknown[0]}, only "
            f"about {', '.join(sorted(known))}; use sweep.search=tpe, or leave the axis out"
        )
    other = unlearned(plan.config.train.model_dump(mode="json"))
    if other and sweep.search == "advisor":
        raise ConfigError(
            f"sweep.search=advisor: it knows trials of AdamW as it comes, and none with this "
            f"train.{other}; use sweep.search=tpe, or leave train.{other} out"
        )
    if unknown or other:
        return None
    advisor = SweepAdvisor(_past(plan, history), scenario_of(plan), sweep.metric, seed=sweep.seed)
    if sweep.search == "auto" and advisor.relevance(plan.space) < LEARNED:
        return None
    return advisor


def _known_axes() -> set[str]:
    """Return the settings that are columns of the learned model."""
    return {
        *("train.learning_rate", "train.per_device_train_batch_size", "train.max_steps"),
        *("train.gradient_accumulation_steps", "train.num_train_epochs", "method.type"),
        *(f"method.{name}" for name in (*capacities(), "lora_alpha", "lora_dropout")),
    }


def _past(plan: SweepPlan, history: History) -> Knowledge:
    """Return the knowledge without the sweep's own trials, which a resumed sweep is given anyway.

    Counted twice, they would prove the past right, whatever it says.
    """
    if not history.trials(sweep_id=plan.sweep_id, limit=1):
        return knowledge_of(history)
    return Knowledge.of(row for row in history.trials() if row.sweep_id != plan.sweep_id)


def scenario_of(plan: SweepPlan) -> dict[str, float]:
    """Return the columns of a sweep's scenario, whose own trials form a group of their own."""
    config = plan.config
    corpus = plan.corpus(config.data, objective_of(config.train))
    facts, stage = describe_model(config.model), config.train.stage
    profile = {"rows_train": len(corpus.train), "source": corpus.source}
    return (
        model_row(facts.identity, facts.as_dict())
        | data_row(profile)
        | category_codes(profile, facts.identity, f"sweep {plan.sweep_id}", stage)
    )


class SweepAdvisor:
    """Chooses a sweep's next trial; see `rayfin.tuning.search.Advisor`."""

    def __init__(
        self, knowledge: Knowledge, scenario: Mapping[str, float], metric: str, *, seed: int = 0
    ) -> None:
        self._scenario, self._metric = scenario, metric
        self._past = knowledge.quality_model.posterior(scenario).process
        self._seed = seed

    def relevance(self, space: SearchSpace) -> float:
        """Return how much the past says about points of the sweep's space: see `relevance`."""
        from random import Random

        random = Random(0)
        points = (space.drawn(random) for _ in range(_POINTS_JUDGED))
        specs = [space.spec_of(point).model_dump(mode="json") for point in points]
        return float(relevance(self._past, self._rows(specs)).mean())

    def choose(
        self,
        options: Sequence[Mapping[str, Any]],
        ended: Sequence[EndedTrial],
        running: Sequence[Mapping[str, Any]],
    ) -> int:
        """Return the index of the option with the largest expected improvement."""
        rows = self._rows(options)
        # Ended trials count as whole ones: what matters is what such a setting comes to.
        tried = self._rows([*(one.spec for one in ended), *running])
        left = _unlike(rows, tried) if len(tried) < _SPREAD_TRIALS else np.arange(len(rows))
        rows = rows[left]
        own, regrets = self._regrets(ended)
        models = _averaged_models(_prior_process(), own, regrets)
        if len(self._past.observations):
            odds = _PAST_ODDS / (1.0 + len(own) / _HALVED_AFTER)
            models += _averaged_models(self._past, own, regrets, math.log(odds))
        seed = 10_000 * self._seed + len(tried)  # a resumed sweep draws as a whole one does
        gain = np.zeros(len(rows))
        for model, probability in _model_probabilities(models):
            samples = sample_regrets(model.process, np.concatenate([rows, tried]), seed=seed)
            best = samples[:, len(rows) :].min(axis=1, initial=1.0)
            better = np.maximum(best[:, None] - samples[:, : len(rows)], 0.0).mean(axis=0)
            # Where nothing promises to be better, the best of what is left is chosen.
            better -= 1e-6 * samples[:, : len(rows)].mean(axis=0)
            gain += probability * model.scale * better
        return int(left[(gain * self._ends(own, ended, rows)).argmax()])

    def _ends(self, own: Array, ended: Sequence[EndedTrial], rows: Array) -> Array:
        """Return the probability that trainings at n rows don't diverge (n), by the sweep's own.

        The improvement counts as far as it is reached: expected improvement under an unknown
        constraint (Gardner et al. 2014). A regret of 1 alone leaves the brink too promising.
        """
        if not len(own):
            return np.ones(len(rows))
        failed = np.array([float(one.value is None) for one in ended if not one.recalled])
        seen = regret_observations(own, failed)
        process = GaussianProcess(COLUMNS, self._past.parameters, seen)
        chance: Array = np.clip(process.posterior_mean(failed, rows), 0.0, 0.99)
        return 1.0 - chance

    def _regrets(self, ended: Sequence[EndedTrial]) -> tuple[Array, Array]:
        """Return the sweep's own trials as rows and regrets, none before they can be compared.

        Trials that the history answered belong to the past.
        """
        own = [one for one in ended if not one.recalled]
        rows = self._rows([one.spec for one in own])
        # A trial that was stopped early was so good by then.
        rows[:, _STEPS] = np.fmin(rows[:, _STEPS], [octaves(one.steps) for one in own])
        values = np.array([np.nan if one.value is None else one.value for one in own])
        regrets = regrets_of(values, self._metric) if len(own) > 1 else None
        return (rows[:0], values[:0]) if regrets is None else (rows, regrets)

    def _rows(self, specs: Sequence[Mapping[str, Any]]) -> Array:
        rows = []
        for spec in specs:
            setting = setting_row(spec) or dict.fromkeys(COLUMNS.setting, math.nan)
            values = {**self._scenario, **setting}
            rows.append([values.get(name, math.nan) for name in COLUMNS.names])
        return np.array(rows, dtype=float).reshape(len(rows), len(COLUMNS.names))


def _unlike(rows: Array, tried: Array) -> NDArray[np.intp]:
    """Return the indices of rows unlike all that were tried, or of all where each is like one."""
    columns = COLUMNS.indices(tuple(_SAME))
    away = np.abs(rows[:, None, columns] - tried[None][:, :, columns])
    same = np.all(away < np.array(list(_SAME.values())), axis=2)
    like = np.any(same, axis=1)
    return np.flatnonzero(~like) if not like.all() else np.arange(len(rows))


def _prior_process() -> GaussianProcess:
    return GaussianProcess(COLUMNS, Hyperparameters.expected(COLUMNS), Observations.none(COLUMNS))


@dataclass(frozen=True)
class _AveragedModel:
    """A process conditioned on the sweep's own trials, under one assumption about their spread."""

    process: GaussianProcess
    log_weight: float
    """The logarithm of the prior odds times the likelihood of those trials."""
    scale: float
    """The assumed spread of scores, as a multiple of the spread seen so far."""


def _averaged_models(
    process: GaussianProcess, rows: Array, regrets: Array, log_odds: float = 0.0
) -> list[_AveragedModel]:
    """Condition a process on the sweep's own trials under each assumption about their spread.

    The worst score that they could come to has not been seen yet, so that the spread of their
    scores may be any multiple of what it is so far. `log_odds` are the process' own prior odds.
    """
    if not len(regrets):
        return [_AveragedModel(process, log_odds, 1.0)]
    before = process.log_marginal_likelihood()
    models = []
    for scale in _SCALES:
        posterior = conditioned_on(process, regret_observations(rows, regrets / scale))
        likelihood = posterior.log_marginal_likelihood() - before - len(regrets) * math.log(scale)
        models.append(_AveragedModel(posterior, log_odds + likelihood, scale))
    return models


def _model_probabilities(
    models: Sequence[_AveragedModel],
) -> Iterator[tuple[_AveragedModel, float]]:
    """Yield each model that counts, with its posterior probability."""
    most = max(model.log_weight for model in models)
    weights = [math.exp(model.log_weight - most) for model in models]
    for model, weight in zip(models, weights, strict=True):
        if (probability := weight / sum(weights)) >= _MIN_PROBABILITY:
            yield model, probability
