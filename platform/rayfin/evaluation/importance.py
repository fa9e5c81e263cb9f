"""Which swept settings mattered: Optuna's PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rayfin.config import DataConfig, ModelConfig
from rayfin.evaluation.quantities import setting
from rayfin.history.comparable import comparison_groups, eval_digests, written_settings
from rayfin.history.record import finite

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from rayfin.history.record import TrialRecord

# With fewer, chance alone gives every parameter some share.
LEAST_TRIALS = 20


def comparable_trials(trials: Sequence[TrialRecord], metric: str) -> list[TrialRecord]:
    """Those that finished with a finite value of the metric, on one model and the same tokens.

    One that was stopped early would have scored better later. Where the sweep varies the model or
    the data, these are the trials of the largest group.
    """
    groups: dict[str, list[TrialRecord]] = {}
    facts = zip(trials, comparison_groups(trials, metric), eval_digests(trials), strict=True)
    for trial, group, digest in facts:
        if trial.status == "finished" and finite(trial.metrics.get(metric)) is not None:
            model = written_settings(trial.spec.get("model"), ModelConfig)
            # Of rows that don't tell what they were scored on, only the same settings are the same.
            data = None if digest else written_settings(trial.spec.get("data"), DataConfig)
            scenario = [group, model, data]
            groups.setdefault(json.dumps(scenario, sort_keys=True), []).append(trial)
    return max(groups.values(), key=len, default=[])


def parameter_importance(
    trials: Sequence[TrialRecord], metric: str, mode: str, parameters: Sequence[str]
) -> dict[str, float]:
    """Each varied parameter's share in reaching the better trials, largest first; sums to 1.

    Empty where nothing can be said: fewer than 20 comparable trials, or no variation in the metric
    or in the parameters. Parameters that never varied are left out.
    """
    scored = comparable_trials(trials, metric)
    values = [float(trial.metrics[metric]) for trial in scored]
    if len(scored) < LEAST_TRIALS or min(values) == max(values):
        return {}
    columns: dict[str, tuple[BaseDistribution, list[Any]]] = {}
    for name in parameters:
        if (column := _column([setting(trial.spec, name) for trial in scored])) is not None:
            columns[name] = column
    return _ped_anova(values, mode, columns) if columns else {}


def _column(settings: list[tuple[bool, Any]]) -> tuple[BaseDistribution, list[Any]] | None:
    """Distribution and values (None where a trial has none); None for what never varied."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    present = [value for has, value in settings if has]
    if all(finite(value) is not None for value in present):
        # Ranks, not values: a log-uniform axis and a uniform one are then judged alike.
        ranks = {value: rank for rank, value in enumerate(sorted(set(present)))}
        if len(ranks) < 2:
            return None
        return IntDistribution(0, len(ranks) - 1), [
            ranks[v] if has else None for has, v in settings
        ]
    # Lists and null are choices too, by their text.
    texts = [json.dumps(value, default=str) if has else None for has, value in settings]
    choices = sorted({text for text in texts if text is not None})
    return (CategoricalDistribution(choices), texts) if len(choices) > 1 else None


def _ped_anova(
    values: list[float], mode: str, columns: dict[str, tuple[BaseDistribution, list[Any]]]
) -> dict[str, float]:
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="minimize" if mode == "min" else "maximize")
        for index, value in enumerate(values):
            row = {name: (kind, column[index]) for name, (kind, column) in columns.items()}
            row = {name: (kind, v) for name, (kind, v) in row.items() if v is not None}
            study.add_trial(
                optuna.create_trial(
                    value=value,
                    params={name: v for name, (_, v) in row.items()},
                    distributions={name: kind for name, (kind, _) in row.items()},
                )
            )
        # Optuna asks for five trials or more in the better group; a tenth of 20 is two.
        evaluator = PedAnovaImportanceEvaluator(target_quantile=max(0.1, 5 / len(values)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            raw = get_param_importances(
                study, evaluator=evaluator, params=list(columns), normalize=False
            )
    finally:
        optuna.logging.set_verbosity(verbosity)
    total = sum(raw.values())
    if not total > 0:
        return {}
    return {name: value / total for name, value in sorted(raw.items(), key=lambda kv: -kv[1])}
