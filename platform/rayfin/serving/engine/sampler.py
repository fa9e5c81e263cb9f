"""Choose the next token of each row, from the logits of one decode step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rayfin.serving.engine.request import SamplingParams, TokenLogprob

INVALID = -1
"""In the place of a token id: the row's logits have no maximum (NaN, +inf, or all -inf)."""

SMALLEST = 1e-30
"""Divisors are at least this: float32 holds it, and nothing that it divides becomes NaN."""

FIRST_LOOK = 128
"""So many of the likeliest tokens are ranked before top_p looks further."""

BLOCK = 256
"""Tokens that a draw adds up together."""


class RowSampler:
    """One request's parameters for choosing tokens, its random numbers, and its token counts.

    Two requests with the same seed and logits get the same tokens, whatever rows are beside them;
    the caller gives each of `n` choices a seed of its own. Without a seed it comes from the
    system's entropy. Counts are kept only for penalties, and only of tokens that occurred.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], vocab_size: int) -> None:
        self.params = params
        self.penalised = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )
        self.plain = params.greedy and not self.penalised and params.logprobs is None
        """The likeliest token and nothing else."""
        self._generator: torch.Generator | None = None
        if not params.greedy:
            self._generator = torch.Generator()
            if params.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(params.seed)
        known: set[int] = set()
        if params.repetition_penalty != 1.0:
            known = {token_id for token_id in prompt_ids if 0 <= token_id < vocab_size}
        self._ids = torch.tensor(sorted(known), dtype=torch.int64)
        self._counts = torch.zeros(len(known), dtype=torch.int64)
        self._place = {token_id: place for place, token_id in enumerate(sorted(known))}

    @property
    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return distinct token ids [k] that penalties apply to, and how often each was generated
        [k].
        """
        return self._ids[: len(self._place)], self._counts[: len(self._place)]

    def uniform(self) -> float:
        """Return the next number of this row, from 0 to below 1; one is used for each token."""
        return torch.rand((), generator=self._generator, dtype=torch.float64).item()

    def record(self, token_id: int) -> None:
        """Counts a generated token."""
        if not self.penalised:
            return
        place = self._place.setdefault(token_id, len(self._place))
        if place == len(self._ids):
            room = torch.zeros(max(16, place), dtype=torch.int64)
            self._ids = torch.cat([self._ids, room])
            self._counts = torch.cat([self._counts, room])
        self._ids[place] = token_id
        self._counts[place] += 1


def sample(
    logits: torch.Tensor, rows: Sequence[RowSampler]
) -> list[tuple[int, TokenLogprob | None]]:
    """Return the next token of each row, with its log probability where the row asks for it.

    `logits` is float32 [len(rows), vocab] on any device and is never written to. In this order, as
    in vLLM: repetition, presence and frequency penalties, temperature, min_p, top_k, top_p, draw.
    Ties at the edge of top_k and top_p stay in. Log probabilities are those of the logits as given,
    before all of these (vLLM's default, `raw_logprobs`).

    A row whose logits have no maximum (NaN, +inf, or all -inf) gets `(INVALID, None)` and leaves
    the other rows as they are; the engine ends it with an error. Each token is recorded in its
    row's counts.
    """
    # One pass gives the argmax and, as NaN and infinities surface in the maximum, the check.
    best, chosen = logits.max(dim=-1)
    valid = best.isfinite()
    if all(row.plain for row in rows):
        return [(token_id, None) for token_id in chosen.where(valid, INVALID).tolist()]

    scores = logits
    if any(row.penalised for row in rows):
        scores = _penalise(logits, rows)
        best, chosen = scores.max(dim=-1)
        valid &= best.isfinite()
    drawing = [place for place, row in enumerate(rows) if not row.params.greedy]
    if drawing:
        drawn = [rows[place] for place in drawing]
        chosen[drawing] = _draw(_pick(scores, drawing), _pick(best, drawing), drawn)
    token_ids: list[int] = chosen.where(valid, INVALID).tolist()
    for row, token_id in zip(rows, token_ids, strict=True):
        if token_id != INVALID:
            row.record(token_id)
    return list(zip(token_ids, _logprobs(logits, rows, token_ids), strict=True))


def _penalise(logits: torch.Tensor, rows: Sequence[RowSampler]) -> torch.Tensor:
    """Return a copy of `logits` with the penalties of all rows taken off.

    Repetition as in Keskar et al. 2019 (arXiv:1909.05858), its sign after vLLM and transformers;
    presence and frequency as OpenAI's API reference has them.
    """
    scores = logits.clone()
    places = [place for place, row in enumerate(rows) if row.penalised]
    seen = [rows[place].seen for place in places]
    lengths = torch.tensor([len(ids) for ids, _ in seen])
    ids = torch.cat([ids for ids, _ in seen]).to(logits.device)
    counts = torch.cat([counts for _, counts in seen]).to(logits.device)

    def spread(values: list[float]) -> torch.Tensor:
        """Repeat one value a row for each of its seen tokens."""
        return torch.tensor(values).repeat_interleave(lengths).to(logits.device)

    params = [rows[place].params for place in places]
    repetition = spread([max(each.repetition_penalty, SMALLEST) for each in params])
    presence = spread([each.presence_penalty for each in params])
    frequency = spread([each.frequency_penalty for each in params])
    where = torch.tensor(places).repeat_interleave(lengths).to(logits.device), ids

    score = scores[where]
    score = torch.where(score > 0, score / repetition, score * repetition)
    score = score - frequency * counts - presence * (counts > 0)
    # A tiny repetition_penalty may overflow; -inf stays what it is, a token that is ruled out.
    scores[where] = score.clamp(max=torch.finfo(score.dtype).max)
    return scores


def _draw(scores: torch.Tensor, best: torch.Tensor, rows: Sequence[RowSampler]) -> torch.Tensor:
    """Draw one token [n] a row from penalised scores [n, vocab] with maxima [n].

    Works on weights, a row's probabilities over its largest one: no step needs them to sum to 1.
    """
    params = [row.params for row in rows]

    def column(values: list[float], dtype: torch.dtype = scores.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=scores.device).unsqueeze(1)

    # The maximum goes first: what is divided is never above 0, so a tiny temperature ends in exp
    # of -inf, not in an overflow. In place, as fresh memory costs more than the arithmetic.
    temperature = column([max(each.temperature, SMALLEST) for each in params])
    weights = (scores - best.unsqueeze(1)).div_(temperature).exp_()

    if any(each.min_p > 0 or each.top_k > 0 for each in params):
        floor = torch.maximum(column([each.min_p for each in params]), _kth(weights, params))
        weights.masked_fill_(weights < floor, 0)
    if nucleus := [place for place, each in enumerate(params) if each.top_p < 1]:
        mass = _pick(weights, nucleus)
        target = column([params[place].top_p for place in nucleus], torch.float64) * _total(mass)
        floor = torch.zeros_like(temperature)
        floor[nucleus] = _nucleus_floor(mass, target, FIRST_LOOK)
        weights.masked_fill_(weights < floor, 0)
    return _invert(weights, column([row.uniform() for row in rows], torch.float64))


def _kth(weights: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Return the weight [n, 1] of each row's top_k-th token; 0 for a row that considers all."""
    vocab = weights.shape[1]
    ranks = [each.top_k if 0 < each.top_k < vocab else 0 for each in params]
    if not any(ranks):
        return torch.zeros_like(weights[:, :1])
    rank = torch.tensor(ranks, device=weights.device).unsqueeze(1)
    kth = weights.topk(max(ranks)).values.gather(-1, (rank - 1).clamp(min=0))
    return kth.masked_fill(rank == 0, 0)


def _nucleus_floor(weights: torch.Tensor, target: torch.Tensor, look: int) -> torch.Tensor:
    """Return the weight [n, 1] of the last token of each row's nucleus.

    The nucleus is the smallest set of likeliest tokens that together weigh `target` [n, 1]
    (Holtzman et al. 2020, arXiv:1904.09751). It is mostly small: ranking `look` tokens costs a
    fraction of sorting the vocabulary, and only rows that need more are looked at again.
    """
    look = min(look, weights.shape[1])
    ranked = weights.topk(look).values
    last = (ranked.cumsum(dim=-1, dtype=torch.float64) < target).sum(dim=-1, keepdim=True)
    floor = ranked.gather(-1, last.clamp(max=look - 1))
    wider = (last == look).squeeze(1).nonzero().squeeze(1)
    if len(wider) == 0:
        return floor
    if look == weights.shape[1]:  # rounding: all tokens together stay just below the target
        return floor.masked_fill(last == look, 0)
    floor[wider] = _nucleus_floor(weights[wider], target[wider], look * 16)
    return floor


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return the token [n] at which the CDF of weights [n, vocab] passes `uniform` [n, 1].

    The CDF runs in the order of the vocabulary, over blocks and then within one, in float64: it is
    the same whatever rows are beside, and a tenth of the work of a running sum over everything.
    """
    blocks = _blocks(weights)
    sums = blocks.sum(dim=-1).double()
    ends = sums.cumsum(dim=-1)
    target = uniform * ends[:, -1:]
    # The clamp is for a row of NaN, which finds no place.
    block = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)
    own = sums.gather(-1, block)
    part = (target - (ends.gather(-1, block) - own)) / own
    within = blocks[torch.arange(len(blocks), device=blocks.device), block.squeeze(1)]
    inner = within.cumsum(dim=-1, dtype=torch.float64)
    target = part.clamp(0, 1 - 2**-53) * inner[:, -1:]
    place = torch.searchsorted(inner, target, right=True)
    return (block * BLOCK + place).clamp(max=weights.shape[1] - 1).squeeze(1)


def _total(weights: torch.Tensor) -> torch.Tensor:
    """Return the sum [n, 1] of weights [n, vocab] in float64; by blocks, to be the same in any
    batch.
    """
    return _blocks(weights).sum(dim=-1).sum(dim=-1, keepdim=True, dtype=torch.float64)


def _blocks(weights: torch.Tensor) -> torch.Tensor:
    """Weights [n, vocab] as [n, blocks, BLOCK], the last block filled up with zeros."""
    missing = -weights.shape[1] % BLOCK
    if missing:
        weights = torch.nn.functional.pad(weights, (0, missing))
    return weights.reshape(len(weights), -1, BLOCK)


def _pick(rows: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """Return `rows[places]`, without the copy where these are all."""
    return rows if len(places) == len(rows) else rows[places]


def _logprobs(
    logits: torch.Tensor, rows: Sequence[RowSampler], token_ids: Sequence[int]
) -> list[TokenLogprob | None]:
    """Return the log probability and the likeliest tokens of each row that asks for them and has a
    token.
    """
    found: list[TokenLogprob | None] = [None] * len(rows)
    places = [
        place
        for place, row in enumerate(rows)
        if row.params.logprobs is not None and token_ids[place] != INVALID
    ]
    if not places:
        return found
    widths = [rows[place].params.logprobs or 0 for place in places]
    logprobs = logits[places].log_softmax(dim=-1)
    chosen = torch.tensor([[token_ids[place]] for place in places], device=logits.device)
    own = logprobs.gather(-1, chosen).squeeze(1).tolist()
    top = logprobs.topk(min(max(widths), logits.shape[1]))
    likeliest, values = top.indices.tolist(), top.values.tolist()
    for row, place in enumerate(places):
        pairs = zip(likeliest[row][: widths[row]], values[row][: widths[row]], strict=True)
        # A token that is ruled out has no log probability that JSON could carry.
        listed = tuple(pair for pair in pairs if pair[1] > -torch.inf)
        found[place] = TokenLogprob(token_ids[place], own[row], listed)
    return found
