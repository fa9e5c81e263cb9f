"""One look at all of a data set that is too large to hold: what is in it, and what is held out."""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from rayfin.config.schema import DataConfig
from rayfin.data.chunks import FileRange, chunks_of, line_before, read_chunk
from rayfin.data.corpus import instead_of, is_empty, shape_of
from rayfin.data.examples import BadRow, Corpus, Example
from rayfin.data.normal import (
    EVAL_SALT,
    ORDER_SALT,
    Census,
    bad_rows,
    content_hash,
    is_preference,
    no_valid_row,
)
from rayfin.data.rows import Row
from rayfin.data.sources import sources_of
from rayfin.data.splits import Sources, Split
from rayfin.data.stream import Stream
from rayfin.errors import DataError

MOST_HELD_OUT = 1000
"""Samples held out of a streamed data set, at most: each evaluation scores them all."""

_SAMPLED = 500
"""Training samples that stand for all of them in the data's profile."""

_KEPT = MOST_HELD_OUT + _SAMPLED + 1
_PART_BYTES = 2**25
_ROWS_TO_KNOW_THE_SHAPE = 1000

# (hash, number of the chunk, canonical sample): the samples with the least hashes are kept.
_Kept = tuple[str, int, str]


@dataclass
class Part:
    """What is in some chunks; of samples, those with the least hashes only."""

    valid: dict[int, int] = field(default_factory=dict)  # chunk -> samples
    digests: dict[int, str] = field(default_factory=dict)  # chunk -> of its samples
    by_prompt: list[_Kept] = field(default_factory=list)
    by_content: list[_Kept] = field(default_factory=list)
    source: str = "g"  # beyond every hash
    known: set[str] = field(default_factory=set)  # hashes of samples that were looked for
    bad: int = 0
    first_bad: tuple[int, int, str] | None = None  # chunk, line in it, reason
    first: BadRow | None = None  # the same, once all chunks are looked through
    census: Census = field(default_factory=Census)

    def add(self, other: Part) -> None:
        """Puts what a later part holds to this one."""
        self.valid |= other.valid
        self.digests |= other.digests
        self.by_prompt = heapq.nsmallest(_KEPT, self.by_prompt + other.by_prompt)
        self.by_content = heapq.nsmallest(_KEPT, self.by_content + other.by_content)
        self.source = min(self.source, other.source)
        self.known |= other.known
        self.bad += other.bad
        self.census.add(other.census)
        self.first_bad = self.first_bad or other.first_bad


Each = Callable[[Callable[[list[int]], Part], Sequence[list[int]]], Iterable[Part]]
"""Calls a function with each of some lists of chunks; the results in their order."""


def survey_corpus(config: DataConfig, each: Each = map) -> Corpus:
    """The corpus of a streamed data set: `eval` whole, of `train` a sample, and its `stream`.

    Held out are the samples whose prompts have the least hashes: round(val_size * n), at most
    `MOST_HELD_OUT`; samples with the same prompt stay together. Raises DataError, also for the
    first bad row, before anything is trained.
    """
    if config.path == "pydocs" or config.max_samples is not None:
        what = "data.path=pydocs" if config.path == "pydocs" else "data.max_samples"
        raise DataError(
            f"data.streaming=true: {what} makes a set that fits into memory; leave one of the two"
        )
    sources = sources_of(config)
    chunks = chunks_of(sources.train)
    shape = shape_of(_first_rows(config, sources, sources.train, chunks), config)
    if shape == "preference":
        raise is_preference(config.path)
    if sources.eval is not None:
        own = chunks_of(sources.eval)
        _first_rows(config, sources, sources.eval, own)
        instead = instead_of(sources.eval, sources)
        evaluated = _looked_through(config, own, shape, each, instead=instead)
        held = evaluated.by_content[:MOST_HELD_OUT]
        known = frozenset(key for key, _, _ in held)
        whole = _looked_through(config, chunks, shape, each, known)
        return _with_own_split(config, sources, chunks, shape, whole, evaluated, held)
    whole = _looked_through(config, chunks, shape, each)
    rows = sum(whole.valid.values())
    if rows < 2 or len({content for _, _, content in whole.by_content}) == 1:
        raise DataError(
            f"data.path: '{config.path}' has {rows} usable rows, and not two different ones; "
            "training and evaluation need at least 2"
        )
    return _held_out(config, sources, chunks, shape, whole)


def _looked_through(
    config: DataConfig,
    chunks: Sequence[FileRange],
    shape: str,
    each: Each,
    known: frozenset[str] = frozenset(),
    instead: str = "",
) -> Part:
    """Returns what is in all chunks; raises DataError for bad rows that are not to be skipped."""
    ignore = frozenset(config.ignore_columns)
    whole = Part(census=Census(ignore))
    for part in each(partial(survey_part, chunks, shape, ignore, known=known), _parts(chunks)):
        whole.add(part)
    rows = sum(whole.valid.values())
    if whole.first_bad is not None:
        number, line, reason = whole.first_bad
        chunk = chunks[number]
        whole.first = BadRow(chunk.file, line_before(chunks, chunk) + line, reason)
        if not rows:
            raise no_valid_row(config, whole.first, instead)
        if config.on_bad_row == "error":
            raise bad_rows(whole.first, whole.bad, rows + whole.bad)
    return whole


def survey_part(
    chunks: Sequence[FileRange],
    shape: str,
    ignore: frozenset[str],
    numbers: Sequence[int],
    known: frozenset[str] = frozenset(),
) -> Part:
    """What is in the chunks of these numbers; `known`: hashes of samples to look for in them."""
    part = Part(census=Census(ignore))
    by_prompt, by_content = _Least(), _Least()
    for number in numbers:
        digest, valid = hashlib.sha256(), 0
        for row in read_chunk(chunks[number], ignore):
            example = part.census.example_or_reason(row, shape)
            if not isinstance(example, Example):
                part.bad += 1
                part.first_bad = part.first_bad or (number, row.line, example)
                continue
            content = example.canonical()
            valid += 1
            digest.update(f"{content}\n".encode())
            part.source = min(part.source, content_hash(ORDER_SALT, content))
            prompt = content_hash(EVAL_SALT, example.canonical_prompt())
            by_prompt.see((prompt, number, content))
            key = content_hash(EVAL_SALT, content)
            by_content.see((key, number, content))
            if key in known:
                part.known.add(key)
        part.valid[number], part.digests[number] = valid, digest.hexdigest()
    part.by_prompt, part.by_content = by_prompt.least(), by_content.least()
    return part


class _Least:
    """The first `_KEPT` of what it sees; it holds a few times as many."""

    def __init__(self) -> None:
        self._held: list[_Kept] = []
        self._bound: _Kept | None = None

    def see(self, one: _Kept) -> None:
        if self._bound is None or one < self._bound:
            self._held.append(one)
            if len(self._held) > 4 * _KEPT:
                self._held = self.least()
                self._bound = self._held[-1]

    def least(self) -> list[_Kept]:
        return heapq.nsmallest(_KEPT, self._held)


def _held_out(
    config: DataConfig, sources: Sources, chunks: Sequence[FileRange], shape: str, whole: Part
) -> Corpus:
    """The corpus of a data set without a split to evaluate on: some rows are held out."""
    rows = sum(whole.valid.values())
    wanted = min(max(round(config.val_size * rows), 1), rows - 1, MOST_HELD_OUT)
    held = _least(whole.by_prompt, wanted)
    by_prompt = bool(held)
    # Where not even one prompt's samples fit, whole samples are kept together instead.
    held = held or _least(whole.by_content, wanted) or _first_group(whole.by_content)
    if len(held) == len(whole.by_content):
        raise DataError(
            f"data.path: '{config.path}': almost all of its {rows} rows are the same; "
            "give different ones"
        )
    taken = Counter(number for _, number, _ in held)
    stream = Stream(
        shape=shape,
        chunks=tuple(chunks),
        rows=tuple(whole.valid[n] - taken[n] for n in range(len(chunks))),
        held_to=held[-1][0],
        held_by_prompt=by_prompt,
        bad_rows=whole.bad,
        ignore=whole.census.ignore,
    )
    return _corpus(config, sources, stream, [whole], held)


def _with_own_split(
    config: DataConfig,
    sources: Sources,
    chunks: Sequence[FileRange],
    shape: str,
    whole: Part,
    evaluated: Part,
    held: Sequence[_Kept],
) -> Corpus:
    """The corpus of a data set with a split to evaluate on, of which `held` are the samples."""
    stream = Stream(
        shape=shape,
        chunks=tuple(chunks),
        rows=tuple(whole.valid[n] for n in range(len(chunks))),
        held_to="",  # before every hash: all of the train split is trained on
        held_by_prompt=False,
        bad_rows=whole.bad + evaluated.bad,
        ignore=whole.census.ignore,
    )
    return _corpus(config, sources, stream, [whole, evaluated], held)


def _corpus(
    config: DataConfig,
    sources: Sources,
    stream: Stream,
    parts: Sequence[Part],
    held: Sequence[_Kept],
) -> Corpus:
    """`parts`: what is in the split that is trained on, and in that which is evaluated on, if it is
    another one."""
    digest = hashlib.sha256(f"{stream.held_to} {stream.held_by_prompt}\n".encode())
    census = Census(frozenset(config.ignore_columns))
    for part in parts:
        digest.update(b"eval\n" if part is not parts[0] else b"")
        for number in sorted(part.digests):
            digest.update(part.digests[number].encode())
        census.add(part.census)
    census.check_ignored()
    examples = (Example.from_canonical(content) for _, _, content in parts[0].by_content)
    sample = itertools.islice((e for e in examples if not stream.is_held(e)), _SAMPLED)
    bad = tuple(part.first for part in parts if part.first is not None)
    common = sum(key in parts[0].known for key, _, _ in held)
    return Corpus(
        train=tuple(sample),
        eval=tuple(Example.from_canonical(content) for _, _, content in held),
        shape=stream.shape,
        digest=digest.hexdigest()[:32],
        source=min(part.source for part in parts)[:32],
        skipped=bad,
        eval_split=sources.eval_split,
        eval_rows_in_train=common,
        notes=(
            *sources.notes(sum(stream.rows), len(held), common, config.val_size),
            *census.notes(stream.bad_rows, bad[0] if bad else None),
        ),
        stream=stream,
    )


def _least(kept: Sequence[_Kept], wanted: int) -> Sequence[_Kept]:
    """The first ones, at most `wanted`, of each hash all or none."""
    count = min(wanted, len(kept))
    while 0 < count < len(kept) and kept[count - 1][0] == kept[count][0]:
        count -= 1
    return kept[:count]


def _first_group(kept: Sequence[_Kept]) -> Sequence[_Kept]:
    return [each for each in kept if each[0] == kept[0][0]]


def _parts(chunks: Sequence[FileRange]) -> list[list[int]]:
    """The numbers of the chunks, in lists of some 32 MB of lines, or of one row group, each."""
    parts: list[list[int]] = []
    filled = _PART_BYTES
    for number, chunk in enumerate(chunks):
        if filled >= _PART_BYTES or chunk.is_parquet:
            parts.append([])
            filled = 0
        parts[-1].append(number)
        filled += chunk.stop - chunk.start
    return parts


def _first_rows(
    config: DataConfig, sources: Sources, split: Split, chunks: Sequence[FileRange]
) -> list[Row]:
    ignore = frozenset(config.ignore_columns)
    rows = itertools.chain.from_iterable(read_chunk(chunk, ignore) for chunk in chunks)
    found = list(itertools.islice(rows, _ROWS_TO_KNOW_THE_SHAPE))
    if not found:
        raise is_empty(config, split, instead_of(split, sources))
    return found
