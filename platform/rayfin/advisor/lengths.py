"""The lengths of samples where the model's tokenizer is not here to count them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from rayfin.advisor.measurements import LengthFacts
from rayfin.data import Corpus
from rayfin.language import localized
from rayfin.samples import ChatTurn, Example

_BYTES_A_TOKEN = 2.5
"""UTF-8 bytes of a token, on the safe side: a token of SmolLM2's has 4.1 of CLINC150's intents and
2.8 of GSM8K's problems, whose digits are tokens of their own."""
_TOKENS_A_TURN = 8
"""Tokens that a chat template adds to each turn: ChatML's are 5, and many add a system turn."""
_SAMPLES = 2000
_STEP = 64
_MOST = 2048
"""The tokens up to which no sample is cut for the sake of memory."""


def estimated_lengths(corpus: Corpus) -> LengthFacts:
    """Return the lengths of the first samples, whose order is random, from the bytes of their text.

    `corpus` is not streamed and has a sample.
    """
    some = [*corpus.train[:_SAMPLES], *corpus.eval[: _SAMPLES // 4]]
    counted = [_tokens(example) for example in some]
    lengths = np.array([sum(each) for each in counted])
    learned = sum(each[-1] for each in counted)
    return LengthFacts(
        float(lengths.mean()),
        math.ceil(np.quantile(lengths, 0.95)),
        int(lengths.max()),
        learned / int(lengths.sum()),
    )


def length_to_keep(lengths: LengthFacts) -> int:
    """Return the max_length that cuts no sample, or, of longer ones than 2048, 5 % at most."""
    longest, usual = lengths.tokens_per_sample_max, lengths.tokens_per_sample_p95
    wanted = longest if longest <= _MOST else max(usual, _MOST)
    return _STEP * math.ceil(wanted / _STEP)


def lengths_note(lengths: LengthFacts) -> str:
    """Return the line that says how the lengths were come by."""
    return localized(
        "the samples are taken to have {mean:.0f} tokens in the mean, 95 % of them at most {most}, "
        "by the bytes of their text (2.5 a token); the model's tokenizer is not here to count them",
        mean=lengths.tokens_per_sample_mean,
        most=lengths.tokens_per_sample_p95,
    )


def _tokens(example: Example) -> list[int]:
    """Return the tokens of each turn of a sample, the one that is learned last."""
    if example.text is not None:
        return [_of(example.text)]
    return [_TOKENS_A_TURN + sum(map(_of, _texts(turn))) for turn in example.messages]


def _texts(turn: ChatTurn) -> Iterator[str]:
    yield str(turn.get("content") or "")
    yield from (str(call) for call in turn.get("tool_calls") or ())


def _of(text: str) -> int:
    return math.ceil(len(text.encode(errors="replace")) / _BYTES_A_TOKEN)
