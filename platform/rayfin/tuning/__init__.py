"""Sweeps: a dotted search space, warm workers, and a history that remembers every trial."""

from rayfin.tuning.space import check_space, trial_config, values_in

__all__ = ["check_space", "trial_config", "values_in"]
