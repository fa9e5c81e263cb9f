"""Read and tokenise the samples of a streamed data set, a range at a time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from rayfin.data.accepted import encode_accepted
from rayfin.data.conversion import RowStatistics
from rayfin.data.file_ranges import read_range
from rayfin.data.fitting import fit_samples
from rayfin.data.stream import SampleRange, Stream
from rayfin.data.token_settings import DEFAULTS, TokenSettings
from rayfin.data.tokenization import encode_examples
from rayfin.objectives import Objective
from rayfin.samples import Example, TokenizedSample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

StreamReader = Callable[
    [Stream, Sequence[SampleRange], int, int], Iterator[tuple[int, TokenizedSample | None]]
]
"""Called with a stream, sample ranges, the seed and max_length; yields (lane, sample) in order.

None stands for a sample that the chat template refuses.
"""


def tokenize_range(
    stream: Stream,
    samples: SampleRange,
    tokenizer: PreTrainedTokenizerFast,
    objective: Objective,
    settings: TokenSettings = DEFAULTS,
    *,
    seed: int,
    max_length: int,
) -> list[TokenizedSample | None]:
    """Return the samples of a range, cut to `max_length` tokens.

    A sample whose answer lies beyond `max_length`, or that is left out, keeps two tokens and no
    loss, so that it still occupies its place in the plan; one that the chat template refuses is
    None. Raises RefusedConversation for it unless `settings.on_bad_row` is skip.
    """
    source = stream.sources[samples.file_range.source]
    statistics = RowStatistics(source.settings)
    rows = read_range(samples.file_range, source.settings)
    converted = (statistics.convert(row, source.shape) for row in rows)
    valid = (example for example in converted if isinstance(example, Example))
    examples = [*source.trained(valid, samples.number)]
    random.Random(f"{seed}/{samples.epoch}/{samples.number}").shuffle(examples)
    examples = examples[samples.start : samples.stop]
    encode = partial(encode_examples, tokenizer=tokenizer, objective=objective, settings=settings)
    encoded = encode_accepted(examples, encode, settings)
    wholes = [whole for whole in encoded if whole is not None]
    fit = fit_samples(
        [example for example, it in zip(examples, encoded, strict=True) if it is not None],
        wholes,
        encode=encode,
        max_length=max_length,
        objective=objective,
        settings=settings,
    )
    kept = (
        objective.without_loss(whole) if it is None else it
        for it, whole in zip(fit, wholes, strict=True)
    )
    return [None if whole is None else next(kept) for whole in encoded]


def read_in_process(
    tokenizer: PreTrainedTokenizerFast, objective: Objective, settings: TokenSettings = DEFAULTS
) -> StreamReader:
    """Return a reader that reads and tokenises in this process, each range when it is needed."""

    def read(
        stream: Stream, ranges: Sequence[SampleRange], seed: int, max_length: int
    ) -> Iterator[tuple[int, TokenizedSample | None]]:
        for each in ranges:
            tokenized = tokenize_range(
                stream, each, tokenizer, objective, settings, seed=seed, max_length=max_length
            )
            for sample in tokenized:
                yield each.lane, sample

    return read
