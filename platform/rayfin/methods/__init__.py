"""Fine-tuning methods: a module each, and one way to attach them to a base model."""

import pkgutil
from importlib import import_module

from rayfin.methods.attach import attach, detach, linear_modules, linear_names
from rayfin.methods.base import METHODS, MethodConfig, capacities, methods_that, register
from rayfin.methods.state import (
    load_state_beside,
    load_training_state,
    state_beside,
    training_state,
)

__all__ = [
    "METHODS",
    "MethodConfig",
    "attach",
    "capacities",
    "detach",
    "linear_modules",
    "linear_names",
    "load_all",
    "load_state_beside",
    "load_training_state",
    "methods_that",
    "register",
    "state_beside",
    "training_state",
]


def load_all() -> None:
    """Import every module of this package, so that a method is there once its file is."""
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")


load_all()
