"""Fine-tuning methods: a module each, and one way to attach them to a base model.

Every module here is imported, so that a method is there once its file is.
"""

import pkgutil
from importlib import import_module

from rayfin.methods.attach import attach, detach, linear_names
from rayfin.methods.base import METHODS, MethodConfig, capacities, methods_that, register
from rayfin.methods.state import load_training_state, training_state

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "METHODS",
    "MethodConfig",
    "attach",
    "capacities",
    "detach",
    "linear_names",
    "load_training_state",
    "methods_that",
    "register",
    "training_state",
]
