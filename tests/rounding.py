"""How far results in floating point may lie from exact ones, on any processor.

A tolerance follows from the type, the number of terms of a sum and their magnitudes, not from what
one processor gave: another one adds in another order, with or without fused multiply-add, and is as
right. The sources are

- Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition (SIAM 2002), chapter 3;
- Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, SIAM Journal on
  Scientific Computing 41(5), 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# At most 2 exp(-LAMBDA^2 / 2) = 3e-8 of all sums are off by more than the probabilistic bound.
LAMBDA = 6.0
# A library's exponential is right to a few units in the last place, and so is ours.
EXPONENTIAL = 8


def unit_roundoff(dtype: torch.dtype = torch.float32) -> float:
    """Largest relative error of one rounded operation."""
    return torch.finfo(dtype).eps / 2


def growth(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """A sum of so many products is off by at most this times the sum of their magnitudes.

    Whatever the order is: the smaller one of k u / (1 - k u) (Higham, section 3.1), which always
    holds, and lambda sqrt(k) u (Higham and Mary, theorem 3.1), as roundings go both ways.
    """
    u = unit_roundoff(dtype)
    return min(terms * u / (1 - terms * u), LAMBDA * math.sqrt(terms) * u)


def loss_error(loss: float, terms: int, dtype: torch.dtype = torch.float32) -> float:
    """How far a language model's mean loss may be off; `terms`: of its longest sums.

    What a layer computes is exact for weights that are off by growth(terms) of themselves (backward
    error, Higham, section 3.5). To first order the loss then is off by that times the sum over all
    weights of |d loss / d w * w|: 0.7 to 1.1 times the loss itself on the trained tiny model, with
    every method. Twice that, for norms, activations and softmax beside the products.
    """
    return 2 * growth(terms, dtype) * loss


@dataclass(frozen=True)
class Inexact:
    """What float32 arithmetic computes, known in float64, and by how much it may be off.

    The error is carried along each operation (running error analysis, Higham, section 3.3).
    """

    value: torch.Tensor
    error: torch.Tensor

    @classmethod
    def of(cls, tensor: torch.Tensor, relative: float = 0.0) -> Inexact:
        """An operand that is exact, or off by so much of itself."""
        value = tensor.detach().double()
        return cls(value, value.abs() * relative)

    @property
    def size(self) -> torch.Tensor:
        """The largest magnitude that it may have."""
        return self.value.abs() + self.error

    def times(self, other: Inexact, onto: Inexact | None = None) -> Inexact:
        """self @ other, added to `onto` within the same sums."""
        value, terms = self.value @ other.value, self.value.shape[-1]
        inherited = self.error @ other.size + self.value.abs() @ other.error
        magnitude = self.size @ other.size
        if onto is not None:
            value, terms = value + onto.value, terms + 1
            inherited, magnitude = inherited + onto.error, magnitude + onto.size
        return Inexact(value, inherited + growth(terms) * magnitude)

    def __add__(self, other: Inexact) -> Inexact:
        value = self.value + other.value
        inherited = self.error + other.error
        return Inexact(value, inherited + unit_roundoff() * (self.size + other.size))

    def __mul__(self, other: Inexact) -> Inexact:
        inherited = self.error * other.size + self.value.abs() * other.error
        rounded = unit_roundoff() * self.size * other.size
        return Inexact(self.value * other.value, inherited + rounded)

    def _shifted(self) -> torch.Tensor:
        """By how much of itself e^(x - largest x) may be off, along the last dimension."""
        below = self.value.amax(-1, keepdim=True) - self.value
        steps = unit_roundoff() * (
            EXPONENTIAL + 2 * below
        )  # x - largest, and its reduction by ln 2
        return self.error + self.error.amax(-1, keepdim=True) + steps

    def softmax(self) -> Inexact:
        """Along the last dimension, in one go or block by block."""
        value, own = self.value.softmax(-1), self._shifted()
        total = (value * own).sum(-1, keepdim=True) + growth(self.value.shape[-1])
        return Inexact(value, value * (own + total + 2 * unit_roundoff()))

    def log_softmax(self) -> Inexact:
        """Along the last dimension."""
        value, own = self.value.log_softmax(-1), self._shifted()
        total = (value.exp() * own).sum(-1, keepdim=True) + growth(self.value.shape[-1])
        return Inexact(value, self.error + total + 4 * unit_roundoff() * (value.abs() + 1))

    def assert_holds(self, given: torch.Tensor, times: float = 1.0) -> None:
        """Fails where `given` lies further away than `times` the bound."""
        off = (given.detach().double() - self.value).abs()
        assert off.shape == self.value.shape
        # What is no number is not within any bound.
        wrong = ~(off <= times * self.error)
        share = (off / self.error.clamp(min=torch.finfo(torch.float32).tiny)).max()
        assert not wrong.any(), (
            f"{int(wrong.sum())} of {wrong.numel()} values are off by more than rounding explains: "
            f"by {float(off.max()):.3g}, up to {float(share):.3g} times its bound"
        )
