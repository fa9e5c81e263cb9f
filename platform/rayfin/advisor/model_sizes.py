"""Decide by their sizes whether one model's trials say something about another model.

The best settings move with the size of a model. By the law that tinker-cookbook fitted over many
models (`get_lr`), a low-rank method's learning rate falls with the width to the power 0.78, so that
models whose parameters differ by a factor of five (and widths by 1.7) differ by 1.5 in their rate,
which is less than the smallest noticeable factor, two. Trials of models farther away than that
decide nothing, however many there are.

A model below `LEAST_PARAMETERS` is a toy, such as the built-in `tiny`: the smallest published
families that people adapt begin at 14 million parameters (Pythia, arXiv:2304.01373), and what a
model of random weights does with a learning rate says nothing about any that was trained. Its
trials count for itself alone.
"""

from __future__ import annotations

import math

from rayfin.language import localized

LEAST_PARAMETERS = 10_000_000
FACTOR = 5.0
"""The largest factor between the parameters of two models whose trials count for each other."""


def is_toy(parameters: float) -> bool:
    """Whether a model with so many parameters is a toy; False where the number is NaN."""
    return 0 < parameters < LEAST_PARAMETERS


def is_comparable(parameters: float, other: float) -> bool:
    """Whether two models are of about the same size; False where either size is NaN."""
    return abs(math.log(parameters / other)) <= math.log(FACTOR) if other > 0 else False


def format_size(parameters: float) -> str:
    """Return a number of parameters as text, such as `8 billion parameters`."""
    if parameters >= 1e9:
        return localized("{size:.3g} billion parameters", size=parameters / 1e9)
    if parameters >= 1e6:
        return localized("{size:.3g} million parameters", size=parameters / 1e6)
    return localized("{size:,.0f} parameters", size=parameters)
