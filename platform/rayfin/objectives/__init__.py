"""Objectives of training: a module each, and the registry of them."""

import pkgutil
from importlib import import_module
from typing import Any

from rayfin.objectives.base import (
    DEFAULT,
    OBJECTIVES,
    Companion,
    Objective,
    main_metric,
    register,
    stage_of,
)
from rayfin.objectives.sft import SFT

__all__ = [
    "DEFAULT",
    "OBJECTIVES",
    "SFT",
    "Companion",
    "Objective",
    "load_all",
    "main_metric",
    "objective_of",
    "register",
    "stage_of",
]


def objective_of(train: Any) -> Objective:
    """Return the objective that a section `train` names, with the settings that it has there."""
    return OBJECTIVES[train.stage](train)


def load_all() -> None:
    """Import every module of this package, so that an objective is there once its file is."""
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")


load_all()
