"""Optuna's samplers, and the studies that they learn from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import optuna

from rayfin.config import Config


def new_sampler(config: Config) -> optuna.samplers.BaseSampler:
    """Return the sampler that a sweep's configuration asks for."""
    sweep = config.sweep
    if sweep.search in ("random", "grid"):
        return optuna.samplers.RandomSampler(seed=sweep.seed)
    # Optuna's default of 10 random trials would leave TPE nothing to do in a sweep of 8.
    startup = max(3, min(10, sweep.num_samples // 3))
    with warnings.catch_warnings():  # Optuna calls `group` experimental
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=sweep.seed,
            n_startup_trials=startup,
            multivariate=True,
            group=True,  # axes that only some methods have are drawn from the trials that have them
            constant_liar=True,
        )


def with_values(study: optuna.Study, values: Mapping[int, float]) -> optuna.Study:
    """Return a study with the same trials, in which those of `values` have other values.

    What a study was told of a trial is final. `values` are by the trials' numbers, which stay, as
    does the sampler with the state of its random numbers.
    """
    changed = optuna.create_study(sampler=study.sampler, direction=study.direction)
    for trial in study.trials:
        if (value := values.get(trial.number)) is not None:
            trial.value = value
        changed.add_trial(trial)
    return changed
