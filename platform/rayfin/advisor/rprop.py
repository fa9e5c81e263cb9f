"""iRprop- (Igel & Huesken 2000): a minimum by the signs of the gradient, within bounds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_STEPS = 60


def rprop(loss: Callable[[Array], tuple[float, Array]], start: Array, floor: Array) -> Array:
    """The best point of `_STEPS`, each coordinate moved by a step of its own, none below `floor`.

    `loss` returns a value and its gradient; a value of infinity is a point that there is not.
    """
    point = np.maximum(start, floor)
    steps = np.full_like(point, 0.1)
    before = np.zeros_like(point)
    best, least = point, np.inf
    for _ in range(_STEPS):
        value, gradient = loss(point)
        if value < least:
            best, least = point, value
        turned = gradient * before
        steps = np.clip(
            steps * np.where(turned > 0, 1.2, np.where(turned < 0, 0.5, 1.0)), 1e-4, 0.5
        )
        gradient = np.where(turned < 0, 0.0, gradient)
        before = gradient
        point = np.maximum(point - np.sign(gradient) * steps, floor)
    return best
