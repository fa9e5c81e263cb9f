"""Sweeps: a dotted search space, warm workers, and a history that remembers every trial."""
