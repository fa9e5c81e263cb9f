"""Find the frozen models that an objective uses beside the one that is trained: a teacher, say."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

from rayfin.config import ModelConfig, TrainConfig
from rayfin.errors import ModelError
from rayfin.models import ModelFacts, describe_model
from rayfin.objectives import objective_of

T = TypeVar("T")


def companion_models(train: TrainConfig, model: ModelConfig) -> dict[str, ModelConfig]:
    """Return the companions of a trial's objective, by the settings of `train` that name them.

    They are loaded in the data type that `model`, the base, asks for.
    """
    found = objective_of(train).companions().items()
    return {
        name: ModelConfig(name=one.name, revision=one.revision, dtype=model.dtype)
        for name, one in found
    }


def of_companions(
    train: TrainConfig, model: ModelConfig, ask: Callable[[ModelConfig], T]
) -> dict[str, T]:
    """Return what `ask` answers for each companion, by the setting that names it.

    A ModelError that it raises is raised with that setting's name in the place of `model.name`.
    """
    found: dict[str, T] = {}
    for name, companion in companion_models(train, model).items():
        try:
            found[name] = ask(companion)
        except ModelError as error:
            raise ModelError(str(error).replace("model.name", f"train.{name}")) from error
    return found


def companion_facts(train: TrainConfig, model: ModelConfig) -> tuple[ModelFacts, ...]:
    """Return the sizes of the companions, for estimates; raises ModelError."""
    return tuple(of_companions(train, model, _described).values())


# Estimates of many configurations ask again and again, and a hub's models come over the network.
_described = functools.lru_cache(maxsize=64)(describe_model)
