"""How long the samples of data are, and where they are cut.

Where the model's tokenizer is not here to count them, their text tells about how long they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from rayfin.advisor.measurements import LengthFacts
from rayfin.language import localized
from rayfin.samples import ChatTurn, Example

if TYPE_CHECKING:
    from rayfin.data import Corpus

_BYTES_A_TOKEN = 2.5
"""UTF-8 bytes of a token, on the safe side: a token of SmolLM2's has 4.1 of CLINC150's intents and
2.8 of GSM8K's problems, whose digits are tokens of their own."""
_TOKENS_A_TURN = 8
"""Tokens that a chat template adds to each turn: ChatML's are 5, and many add a system turn."""
SAMPLED = 2000
"""The number of samples whose lengths are looked at: the first ones, as their order is random."""
_STEP = 32
"""max_length is a multiple of this, so that a few more words don't change the setting."""
UNCUT = 2048
"""The tokens up to which no sample is cut for the sake of memory: a convention."""


def estimated_lengths(corpus: Corpus) -> LengthFacts:
    """Return the lengths of the first samples, whose order is random, from the bytes of their text.

    `corpus` is not streamed and has a sample.
    """
    some = [*corpus.train[:SAMPLED], *corpus.eval[: SAMPLED // 4]]
    counted = [_tokens(example) for example in some]
    lengths = np.array([sum(each) for each in counted])
    learned = sum(each[-1] for each in counted)
    return LengthFacts(
        float(lengths.mean()),
        math.ceil(np.quantile(lengths, 0.95)),
        int(lengths.max()),
        learned / int(lengths.sum()),
    )


def max_length_within(most: int, p95: int, longest: int) -> int:
    """Return the max_length that cuts no sample, if `most` tokens are enough for that.

    Otherwise it is `most`, or the 95th percentile of the lengths if that is more.
    """
    wanted = longest if longest <= most else max(p95, most)
    return max(_STEP, _STEP * math.ceil(wanted / _STEP))


def kept_length(lengths: LengthFacts) -> int:
    """Return the max_length that cuts no sample, or 5 % of them where some are beyond `UNCUT`."""
    longest, p95 = lengths.tokens_per_sample_max, lengths.tokens_per_sample_p95
    return max_length_within(UNCUT, p95, longest)


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
