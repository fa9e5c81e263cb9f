"""Which sample of a large data set is trained on when, without ever holding the set.

Each of the samples of an optimizer step has a *lane* of its own: a lane of n takes every n-th chunk
of the epoch's shuffled chunks, and of each chunk the samples in an order shuffled anew. So a sample
is known by its step and its lane: a worker reads the chunks of its own lanes only, any number of
workers trains the same steps, and a trial that goes on opens its lanes where it stood.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rayfin.data.chunks import FileRange, read_chunk
from rayfin.data.examples import NO_LOSS, Example, TokenizedSample
from rayfin.data.normal import EVAL_SALT, Census, content_hash
from rayfin.data.tokens import fitting, tokenize_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Stream:
    """A data set's chunks, and what a survey found in them."""

    shape: str
    chunks: tuple[FileRange, ...]
    rows: tuple[int, ...]
    """Training samples of each chunk."""
    held_to: str
    """Samples whose hash is at most this one are held out for evaluation."""
    held_by_prompt: bool
    """Whether the prompt is hashed, or, where almost all prompts are the same, the sample."""
    bad_rows: int
    ignore: frozenset[str] = frozenset()
    """Columns, and keys of turns, that are not looked at."""

    def is_held(self, example: Example) -> bool:
        content = example.canonical_prompt() if self.held_by_prompt else example.canonical()
        return content_hash(EVAL_SALT, content) <= self.held_to


@dataclass(frozen=True)
class SampleRange:
    """Samples `start` to `stop` of the `number`th chunk in an epoch's order, for `lane` from step
    `step` on."""

    step: int
    lane: int
    number: int
    chunk: FileRange
    epoch: int
    start: int
    stop: int


Reader = Callable[[Stream, Sequence[SampleRange], int, int], Iterator[tuple[int, TokenizedSample]]]
"""(stream, pieces, seed, max_length) -> (lane, sample) of each piece in turn."""


def pieces_of(
    stream: Stream, *, lanes: Iterable[int], of: int, seed: int, first: int, last: int
) -> list[SampleRange]:
    """What `lanes` of `of` read for steps `first` to `last` (exclusive), as it is first needed."""
    found = [piece for lane in lanes for piece in _lane(stream, lane, of, seed, first, last)]
    return sorted(found, key=lambda piece: (piece.step, piece.lane))


def _lane(
    stream: Stream, lane: int, of: int, seed: int, first: int, last: int
) -> Iterator[SampleRange]:
    position = epoch = 0
    while position < last:
        # Moved on by one lane an epoch: where there are fewer chunks than lanes, each has its turn.
        for number in _shuffled(len(stream.chunks), f"{seed}/{epoch}")[(lane - epoch) % of :: of]:
            rows, chunk = stream.rows[number], stream.chunks[number]
            start, stop = max(first - position, 0), min(last - position, rows)
            if start < stop:
                yield SampleRange(position + start, lane, number, chunk, epoch, start, stop)
            position += rows
        epoch += 1


@functools.lru_cache(maxsize=4)
def _shuffled(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def tokenized_piece(
    stream: Stream,
    piece: SampleRange,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    max_length: int,
) -> list[TokenizedSample]:
    """The samples of a piece; one whose answer lies beyond `max_length` keeps two tokens, and no
    loss: it takes its place, and no time."""
    census = Census(stream.ignore)
    examples = [
        example
        for row in read_chunk(piece.chunk, stream.ignore)
        if isinstance(example := census.example_or_reason(row, stream.shape), Example)
        and not stream.is_held(example)
    ]
    random.Random(f"{seed}/{piece.epoch}/{piece.number}").shuffle(examples)
    samples = tokenize_examples(examples[piece.start : piece.stop], tokenizer)
    return [(fitting([sample], max_length) or [_nothing_of(sample)])[0] for sample in samples]


def _nothing_of(sample: TokenizedSample) -> TokenizedSample:
    ids = sample["input_ids"][:2]
    return {"input_ids": ids, "labels": [NO_LOSS] * len(ids)}


def read_here(tokenizer: PreTrainedTokenizerFast) -> Reader:
    """A reader that does all of it in this process, when it is asked for the next sample."""

    def read(
        stream: Stream, pieces: Sequence[SampleRange], seed: int, max_length: int
    ) -> Iterator[tuple[int, TokenizedSample]]:
        for piece in pieces:
            for sample in tokenized_piece(
                stream, piece, tokenizer, seed=seed, max_length=max_length
            ):
                yield piece.lane, sample

    return read
