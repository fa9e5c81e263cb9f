"""Which tokens come out: the right distribution, the same for a seed, and never a crash."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfin.serving.engine.request import SamplingParams, TokenLogprob
from rayfin.serving.engine.sampler import INVALID, RowSampler, sample

VOCAB = 40
GREEDY = SamplingParams(temperature=0)


def logits_of(rows: int, vocab: int = VOCAB, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def row(prompt: Any = (), vocab: int = VOCAB, **params: Any) -> RowSampler:
    return RowSampler(SamplingParams(**params), prompt, vocab)


def tokens(logits: torch.Tensor, rows: list[RowSampler]) -> list[int]:
    return [token_id for token_id, _ in sample(logits, rows)]


def penalised(
    logits: list[float], params: SamplingParams, prompt: list[int], generated: list[int]
) -> list[float]:
    """The definition, one token at a time."""
    scores = list(logits)
    for token in set(prompt) | set(generated):
        if scores[token] > 0:
            scores[token] /= params.repetition_penalty
        else:
            scores[token] *= params.repetition_penalty
    for token, count in Counter(generated).items():
        scores[token] -= params.presence_penalty + params.frequency_penalty * count
    return scores


def distribution(scores: list[float], params: SamplingParams) -> dict[int, float]:
    """The definition: the probability of each token that may be drawn."""
    top = max(scores)
    weights = {token: math.exp((s - top) / params.temperature) for token, s in enumerate(scores)}
    weights = {token: w for token, w in weights.items() if w >= params.min_p}
    ranked = sorted(weights, key=weights.__getitem__, reverse=True)[: params.top_k or None]
    total = sum(weights[token] for token in ranked)
    kept: dict[int, float] = {}
    for token in ranked:
        if sum(kept.values()) >= params.top_p * total:
            break
        kept[token] = weights[token]
    return {token: w / sum(kept.values()) for token, w in kept.items()}


def test_greedy_rows_get_the_likeliest_token():
    logits = logits_of(16, 5000)
    rows = [RowSampler(GREEDY, [1, 2], 5000) for _ in range(16)]
    assert sample(logits, rows) == [(int(each.argmax()), None) for each in logits]


KINDS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 5},
    {"top_k": 10**9},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 2.0, "top_p": 0.3},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 1.5, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
    {"top_p": 1e-9},
    {"top_k": 1},
]


def test_draws_follow_the_definition_whatever_is_mixed_in_a_batch():
    draws = 2000
    logits = logits_of(len(KINDS))
    rows = [row(seed=draw, **kind) for kind in KINDS for draw in range(draws)]
    drawn = tokens(logits.repeat_interleave(draws, dim=0), rows)
    for place, kind in enumerate(KINDS):
        expected = distribution(logits[place].tolist(), SamplingParams(**kind))
        seen = Counter(drawn[place * draws : (place + 1) * draws])
        assert seen.keys() <= expected.keys(), kind
        for token, share in expected.items():
            # Five standard deviations of a binomial share.
            margin = 5 * math.sqrt(share * (1 - share) / draws) + 1e-9
            assert abs(seen[token] / draws - share) < margin, (kind, token)


@pytest.mark.parametrize("vocab", [2500, 2560])
def test_a_nucleus_of_many_tokens_is_found_beside_a_small_one(vocab: int):
    flat = logits_of(1, vocab, spread=0.5)
    peaked = logits_of(1, vocab, seed=1, spread=8.0)
    draws = 1500
    logits = torch.cat([flat.expand(draws, -1), peaked.expand(draws, -1)])
    rows = [row(vocab=vocab, seed=draw, top_p=0.7) for draw in range(2 * draws)]
    drawn = tokens(logits, rows)
    for place, scores in enumerate([flat, peaked]):
        expected = distribution(scores[0].tolist(), SamplingParams(top_p=0.7))
        seen = Counter(drawn[place * draws : (place + 1) * draws])
        assert seen.keys() <= expected.keys()
        # The mass of the upper half of the vocabulary: the draw reaches every part of it.
        share = sum(p for token, p in expected.items() if token >= vocab // 2)
        found = sum(n for token, n in seen.items() if token >= vocab // 2) / draws
        assert abs(found - share) < 5 * math.sqrt(0.25 / draws)
    wide = distribution(flat[0].tolist(), SamplingParams(top_p=0.7))
    assert len(wide) > 1000 and len(set(drawn[:draws])) > 500


def test_a_seed_gives_the_same_tokens_alone_and_among_others():
    others: list[dict[str, Any]] = [
        *KINDS[:5],
        {"temperature": 0},
        {"seed": 7},
        {"seed": 8, "frequency_penalty": 1.0, "logprobs": 3},
    ]
    asked: dict[str, Any] = {
        "seed": 7,
        "temperature": 0.9,
        "top_p": 0.95,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
    }
    vocab = 3000
    alone, among = row([1, 2], vocab, **asked), row([1, 2], vocab, **asked)
    beside = [row([5], vocab, **params) for params in others]
    for step in range(40):
        logits = logits_of(9, vocab, seed=step)
        place = step % 9
        rows = [*beside[:place], among, *beside[place:]]
        assert tokens(logits[place : place + 1], [alone])[0] == tokens(logits, rows)[place]


def test_other_seeds_and_no_seed_give_other_tokens():
    logits = logits_of(1, 1000, spread=0.1).expand(4, -1)
    rows = [row(vocab=1000, **seed) for seed in ({"seed": 1}, {"seed": 2}, {}, {})]
    steps = [tokens(logits, rows) for _ in range(10)]
    assert len(set(zip(*steps, strict=True))) == 4


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_any_seed_that_a_request_may_carry_works(seed: int):
    logits = logits_of(2, 1000, spread=0.1)
    first, second = ([row(vocab=1000, seed=seed)] * 2 for _ in range(2))
    assert tokens(logits, first) == tokens(logits, second)


@settings(max_examples=40)
@given(
    repetition=st.floats(0.2, 5),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    prompt=st.lists(st.integers(0, VOCAB - 1), max_size=10),
    seed=st.integers(0, 1000),
)
def test_penalties_follow_the_definition(
    rounding: Any,
    repetition: float,
    presence: float,
    frequency: float,
    prompt: list[int],
    seed: int,
):
    params = {
        "repetition_penalty": repetition,
        "presence_penalty": presence,
        "frequency_penalty": frequency,
    }
    one = row(prompt, temperature=0, **params)
    other = row(prompt[:3], temperature=0, repetition_penalty=1.5)
    plain = RowSampler(GREEDY, prompt, VOCAB)
    generated: list[int] = []
    for step in range(25):
        logits = logits_of(3, seed=seed + step % 2, spread=1.0)
        before = logits.clone()
        _, token, likeliest = tokens(logits, [other, one, plain])
        scores = penalised(logits[1].tolist(), one.params, prompt, generated)
        # The two may disagree by rounding alone: of a scaled score less two penalties, twice.
        size = max(repetition, 1 / repetition) * float(logits[1].abs().max())
        size += abs(presence) + abs(frequency) * (step + 1)
        assert max(scores) - scores[token] <= 2 * rounding.growth(4) * size
        assert likeliest == int(logits[2].argmax())
        assert torch.equal(logits, before)
        generated.append(token)


def test_prompt_ids_outside_the_vocabulary_are_no_tokens_of_it():
    plain = row([3], temperature=0, repetition_penalty=2.0)
    padded = row([-1, 3, VOCAB, 10**6], temperature=0, repetition_penalty=2.0)
    logits = logits_of(1)
    for _ in range(5):
        assert tokens(logits, [plain]) == tokens(logits, [padded])


@pytest.mark.numeric
def test_log_probabilities_are_those_of_the_model_itself(rounding: Any):
    logits = logits_of(4)
    logits[2, 3:] = -math.inf
    shaped: dict[str, Any] = {"temperature": 1.7, "top_k": 3, "presence_penalty": 1.0, "seed": 3}
    rows = [
        row(logprobs=5, repetition_penalty=3.0, prompt=range(20), **shaped),
        row(logprobs=0, **shaped),
        row(logprobs=20, **shaped),
        row(**shaped),
    ]
    expected = logits.double().log_softmax(dim=-1)
    bound = rounding.Inexact.of(logits.clamp(min=-1e30)).log_softmax().error
    chosen = sample(logits, rows)
    assert chosen[3][1] is None
    for place, width in enumerate([5, 0, 3]):
        token, found = chosen[place]
        assert isinstance(found, TokenLogprob) and found.token_id == token
        assert abs(found.logprob - expected[place, token]) <= bound[place, token]
        likeliest = expected[place].sort(descending=True)
        assert [i for i, _ in found.top] == likeliest.indices[:width].tolist()
        for at, probability in found.top:
            assert abs(probability - expected[place, at]) <= bound[place, at]


BROKEN = {
    "nan": lambda x: x.fill_(math.nan),
    "one nan": lambda x: x[3:4].fill_(math.nan),
    "nothing allowed": lambda x: x.fill_(-math.inf),
    "overflow": lambda x: x[7:8].fill_(math.inf),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 0, "logprobs": 2},
        {"temperature": 0, "repetition_penalty": 1.3},
        {"seed": 1},
        {"seed": 1, "top_k": 4, "top_p": 0.9, "min_p": 0.01, "frequency_penalty": 1, "logprobs": 2},
    ],
)
def test_a_row_without_a_maximum_is_marked_and_disturbs_no_other(
    broken: str, params: dict[str, Any]
):
    logits = logits_of(3)
    expected = sample(logits, [row([3, 7], **params) for _ in range(3)])
    BROKEN[broken](logits[1])
    rows = [row([3, 7], **params) for _ in range(3)]
    assert sample(logits, rows) == [expected[0], (INVALID, None), expected[2]]
    # The row is unharmed, too: with logits again it goes on.
    assert tokens(logits_of(3), rows)[1] != INVALID


def test_a_token_that_is_ruled_out_is_never_chosen():
    logits = logits_of(200)
    logits[:, 10:] = -math.inf
    for params in ({}, {"repetition_penalty": 1e-300}, {"top_k": 30}, {"presence_penalty": -2}):
        rows = [row(range(VOCAB), temperature=2.0, seed=s, **params) for s in range(200)]
        assert max(tokens(logits, rows)) < 10


@pytest.mark.parametrize("temperature", [1e-6, 1e-300])
@pytest.mark.parametrize("size", [1.0, 1e30])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float, size: float):
    logits = logits_of(50) * size
    rows = [row(temperature=temperature, seed=s, top_p=0.9, min_p=0.1) for s in range(50)]
    assert tokens(logits, rows) == logits.argmax(dim=-1).tolist()


def test_penalties_at_their_limits_choose_a_token():
    for params in ({"repetition_penalty": 1e-300}, {"repetition_penalty": 10.0}):
        for temperature in (0, 2.0):
            one = row(range(VOCAB), temperature=temperature, **params)
            assert all(0 <= tokens(logits_of(1) * 1e30, [one])[0] < VOCAB for _ in range(5))
