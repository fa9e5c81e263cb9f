"""Attention of decoding rows in C beside torch's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rayfin.serving.engine.attention import AttentionKernel, kernel_for
from rayfin.serving.engine.batch import Batch, RowSpan
from rayfin.serving.engine.cache import KVCache

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")
PLACES = 260


def cache(
    kernel: AttentionKernel | None, *, rows: int = 5, heads: int = 2, dim: int = 8
) -> KVCache:
    shape = {"layers": 1, "rows": rows, "heads": heads, "max_length": PLACES, "head_dim": dim}
    made = KVCache(**shape, dtype=torch.float32, device=CPU, kernel=kernel)
    draw = torch.Generator().manual_seed(0)
    for tensor in (*made.keys, *made.values):
        tensor.normal_(generator=draw)
    return made


def batch(lengths: dict[int, int], chunk: RowSpan | None = None) -> Batch:
    """A token a row, the last of so many; and a prompt's chunk."""
    tokens = [RowSpan(row, 0, length - 1, (7,), True) for row, length in lengths.items()]
    return Batch([*tokens, *([chunk] if chunk else [])], CPU)


def queries(heads: int, tokens: int, dim: int) -> torch.Tensor:
    """As a model's layers lay them out: token by token."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(tokens, heads, dim, generator=draw).transpose(0, 1) * 2


def attention(
    rounding: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> Any:
    """As it is defined, with its bound, for query [heads, dim] and [shared heads, places, dim]."""
    exact = rounding.Inexact.of
    group = len(query) // len(keys)
    keys, values = (tensor.repeat_interleave(group, 0) for tensor in (keys, values))
    scores = exact(query[:, None]).times(exact(keys.transpose(1, 2)))
    # The scale is a float32 number.
    return (scores * exact(torch.tensor(scaling))).softmax().times(exact(values))


@pytest.mark.parametrize("kernel", [AttentionKernel(0), AttentionKernel(1), None])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("dim", [8, 20, 64])
@pytest.mark.parametrize("length", [1, 3, 64, 65, PLACES])
def test_it_is_attention_over_a_row(
    length: int, dim: int, group: int, kernel: AttentionKernel | None, rounding: Any
) -> None:
    made = cache(kernel, dim=dim)
    made.begin(batch({1: length, 4: 7}))
    query = queries(2 * group, 2, dim)
    given = made.attend(0, query, 0.3)
    assert given.shape == (2, 2 * group, dim)
    for token, (row, stop) in enumerate({1: length, 4: 7}.items()):
        keys, values = (t[0][row, :, :stop] for t in (made.keys, made.values))
        expected = attention(rounding, query[:, token], keys, values, 0.3)
        expected.assert_holds(given[token][:, None])


@pytest.mark.parametrize("kernel", [AttentionKernel(0), AttentionKernel(1), None])
def test_a_weight_is_right_to_its_last_digits(
    kernel: AttentionKernel | None, rounding: Any
) -> None:
    """Scores are exact and values pick the weights out: the exponential alone may be off."""
    made = cache(kernel, heads=1, dim=64)
    scores = torch.linspace(-1.4, 0.0, 64)
    made.keys[0].zero_()
    made.keys[0][0, 0, :64, 0] = scores
    made.values[0][0, 0, :64] = torch.eye(64)
    made.begin(batch({0: 64}))
    weights = made.attend(0, torch.ones(1, 1, 64), 1.0)[0, 0].double()
    # To the last place, whose exponential is 1: what they are divided by is the same for all.
    off = weights / weights[63] / scores.double().exp() - 1
    assert off.abs().max() <= 2 * rounding.EXPONENTIAL * rounding.unit_roundoff()


def test_beside_a_prompts_chunk_it_is_what_torch_computes(rounding: Any) -> None:
    chunk = RowSpan(2, 0, 3, (7, 8, 9, 10), True)
    query = queries(6, 6, 8)
    results = []
    for kernel in (AttentionKernel(), None):
        made = cache(kernel)
        made.begin(batch({0: 40, 3: 90}, chunk))
        new = [queries(2, 6, 8)[None] + n for n in range(2)]
        made.update(new[0], new[1], 0)
        results.append((made.attend(0, query, 0.3), made.keys[0], made.values[0]))
    (ours, *cached), (torchs, *expected) = results
    # The row of each token, and how much of it it sees; the chunk begins at the fourth place.
    seen = [(0, 40), (3, 90), *((2, stop) for stop in range(4, 8))]
    assert len(ours) == len(torchs) == len(seen)
    for token, (row, stop) in enumerate(seen):
        keys, values = (t[row, :, :stop] for t in cached)
        bound = attention(rounding, query[:, token], keys, values, 0.3)
        for given in (ours, torchs):
            bound.assert_holds(given[token][:, None])
    for one, other in zip(cached, expected, strict=True):
        assert torch.equal(one, other)


def test_company_and_threads_change_no_bit() -> None:
    made, query = cache(AttentionKernel(), dim=64), queries(12, 3, 64)
    was = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        made.begin(batch({0: 100, 1: 33, 2: 260}))
        together = made.attend(0, query, 0.3)
        torch.set_num_threads(1)
        for row, length in enumerate((100, 33, 260)):
            made.begin(batch({row: length}))
            assert torch.equal(made.attend(0, query[:, row : row + 1], 0.3)[0], together[row])
    finally:
        torch.set_num_threads(was)


def test_it_uses_what_the_processor_has_and_torchs_threads() -> None:
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    if " avx2 " in flags and " fma " in flags:
        assert AttentionKernel().variant == 1
    assert AttentionKernel(0).variant == 0
    assert AttentionKernel().parallel == (sys.platform == "linux")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 5, 70, 99])
def test_what_is_no_number_stays_so_and_in_its_row(bad: float, place: int) -> None:
    made, query = cache(AttentionKernel()), queries(4, 2, 8).abs()
    rows = {0: 100, 1: 100}
    made.begin(batch(rows))
    before = made.attend(0, query, 0.3)
    made.keys[0][0, 0, place] = bad
    made.keys[0][1, :, 100:] = bad  # beyond the row's end
    after = made.attend(0, query, 0.3)
    assert after[0, :2].isnan().all(), "the heads that see it"
    assert torch.equal(after[0, 2:], before[0, 2:]) and torch.equal(after[1], before[1])


def test_scores_far_apart() -> None:
    """One place takes it all, and what came before is forgotten, not multiplied by rounding."""
    made = cache(AttentionKernel(), heads=1)
    made.keys[0].zero_()
    made.keys[0][0, 0, 200] = 1000.0
    made.begin(batch({0: 250}))
    given = made.attend(0, torch.ones(1, 1, 8), 1.0)
    assert torch.equal(given[0, 0], made.values[0][0, 0, 200])


def test_a_beginning_that_weighs_nothing(rounding: Any) -> None:
    made = cache(AttentionKernel(), heads=1)
    made.keys[0][0, :, :64] = float("-inf")
    made.begin(batch({0: 90}))
    given = made.attend(0, torch.ones(1, 1, 8), 0.3)
    keys, values = (t[0][0, :, 64:90] for t in (made.keys, made.values))
    expected = attention(rounding, torch.ones(1, 8), keys, values, 0.3)
    expected.assert_holds(given[0][:, None])


@pytest.mark.parametrize(
    "pieces",
    [
        batch({0: PLACES + 1}),
        batch({5: 3}),
        batch({-1: 3}),
        batch({0: 0}),
        batch({0: 3}, RowSpan(1, 0, PLACES - 2, (7, 7, 7), True)),
    ],
)
def test_places_that_are_not_there_are_refused(pieces: Batch) -> None:
    with pytest.raises(IndexError, match="5 rows of 260 places"):
        cache(AttentionKernel()).begin(pieces)


def test_heads_that_do_not_fit_are_refused() -> None:
    made = cache(AttentionKernel())
    made.begin(batch({0: 4, 1: 4}))
    good = queries(2, 2, 8)
    for bad in (queries(3, 2, 8), queries(2, 2, 9), queries(2, 3, 8), good[..., :4]):
        with pytest.raises(RuntimeError, match="expand"):
            made.update(bad[None], good[None], 0)
        with pytest.raises(RuntimeError, match="expand"):
            made.update(good[None], bad[None], 0)
    with pytest.raises(ValueError, match="float32"):
        made.update(good[None].double(), good[None], 0)
    for bad in (queries(3, 2, 8), queries(130, 2, 8), queries(4, 2, 9), queries(4, 2, 8).double()):
        with pytest.raises(ValueError, match="don't fit"):
            made.attend(0, bad, 0.3)


def test_one_head_for_all_of_the_caches() -> None:
    """Models whose configuration doesn't tell how few key/value heads they have."""
    made, one = cache(AttentionKernel()), queries(1, 2, 8)
    made.begin(batch({0: 4, 1: 6}))
    made.update(one[None], one[None], 0)
    for head in range(2):
        assert torch.equal(made.keys[0][1, head, 5], one[0, 1])


def test_only_for_floats_on_cpu() -> None:
    assert isinstance(kernel_for(CPU, torch.float32, 3), AttentionKernel)
    assert kernel_for(CPU, torch.bfloat16, 3) is None
    assert kernel_for(torch.device("cuda"), torch.float32, 3) is None
    assert kernel_for(CPU, torch.float32, 65) is None
