"""Fine-tuning methods: one table, one way to attach them, one check of what can't work."""

from rayfin.methods.attach import (
    after_optimizer_step,
    attach,
    detach,
    linear_names,
    peft_config,
    regularizer,
)
from rayfin.methods.check import check_combination
from rayfin.methods.state import load_training_state, training_state
from rayfin.methods.table import METHODS, Method

__all__ = [
    "METHODS",
    "Method",
    "after_optimizer_step",
    "attach",
    "check_combination",
    "detach",
    "linear_names",
    "load_training_state",
    "peft_config",
    "regularizer",
    "training_state",
]
