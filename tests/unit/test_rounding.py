"""Tolerances of numeric tests let every order of summation through, and no lesser precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("terms", [1, 7, 64, 576, 1536])
def test_every_order_of_a_sum_is_within_and_bfloat16_is_not(terms: int, rounding: Any) -> None:
    draw = torch.Generator().manual_seed(terms)
    a, b = torch.randn(40, terms, generator=draw), torch.randn(terms, 50, generator=draw)
    bound = rounding.Inexact.of(a).times(rounding.Inexact.of(b))
    bound.assert_holds(a @ b)
    one_by_one = torch.zeros(40, 50)
    for term in range(terms):
        one_by_one += a[:, term : term + 1] * b[term]
    bound.assert_holds(one_by_one)
    with pytest.raises(AssertionError, match="off by more than rounding explains"):
        bound.assert_holds((a.bfloat16() @ b.bfloat16()).float())
    one_off = a @ b
    one_off[3, 5] *= 1.001
    with pytest.raises(AssertionError, match="1 of 2000 values"):
        bound.assert_holds(one_off)


def test_softmax_is_within_and_with_a_score_off_by_a_ten_thousandth_it_is_not(
    rounding: Any,
) -> None:
    scores = torch.randn(30, 260, generator=torch.Generator().manual_seed(0)) * 5
    bound, logs = (
        getattr(rounding.Inexact.of(scores), name)() for name in ("softmax", "log_softmax")
    )
    bound.assert_holds(scores.softmax(-1))
    bound.assert_holds(scores.flip(-1).softmax(-1).flip(-1))
    logs.assert_holds(scores.log_softmax(-1))
    for exact, given in ((bound, "softmax"), (logs, "log_softmax")):
        off = scores.clone()
        off[:, ::2] *= 1 + 1e-4
        with pytest.raises(AssertionError):
            exact.assert_holds(getattr(off, given)(-1))


def test_what_is_no_number_is_within_no_bound(rounding: Any) -> None:
    with pytest.raises(AssertionError, match="1 of 2 values"):
        rounding.Inexact.of(torch.ones(2), 1.0).assert_holds(torch.tensor([1.0, float("nan")]))
