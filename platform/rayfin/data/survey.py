"""One pass over a data set that is too large to hold: what is in it, and what is held out."""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from rayfin.config.data import DataConfig
from rayfin.data.content_hash import EVAL_SALT, ORDER_SALT, content_hash
from rayfin.data.conversion import (
    RowStatistics,
    alternative_to,
    bad_rows_error,
    check_shape,
    detect_shape,
    empty_split_error,
    no_valid_row_error,
)
from rayfin.data.corpus import Corpus
from rayfin.data.file_ranges import count_lines_before, file_ranges, read_range
from rayfin.data.rows import BadRow, Row
from rayfin.data.sources import find_splits
from rayfin.data.splits import Split, SplitSelection
from rayfin.data.stream import FileRange, Stream
from rayfin.errors import DataError
from rayfin.objectives import SFT, Objective
from rayfin.samples import Example

MAX_HELD_OUT = 1000
"""The most samples held out of a streamed data set: each evaluation scores them all."""

_SAMPLED = 500
"""The number of training samples that stand for all of them in the data's profile."""

_HASHES_KEPT = MAX_HELD_OUT + _SAMPLED + 1
_BATCH_BYTES = 2**25
_ROWS_TO_DETECT_SHAPE = 1000


class HashedExample(NamedTuple):
    """A sample in canonical form, the range that it is in, and the hash it is ordered by."""

    hash: str
    number: int
    content: str


@dataclass
class RangeSurvey:
    """What some file ranges contain, by their numbers; of the samples, only a few are kept."""

    counts: dict[int, int] = field(default_factory=dict)
    """The number of valid samples in each range."""
    digests: dict[int, str] = field(default_factory=dict)
    """A hash of the samples in each range."""
    by_prompt: list[HashedExample] = field(default_factory=list)
    """The samples with the smallest hashes of their prompts."""
    by_content: list[HashedExample] = field(default_factory=list)
    """The samples with the smallest hashes of their contents."""
    source: str = "g"  # greater than every hash
    """The smallest hash of the samples' order."""
    found: set[str] = field(default_factory=set)
    """Those of the wanted hashes that samples here have."""
    bad: int = 0
    """The number of bad rows."""
    first_bad: tuple[int, int, str] | None = None
    """The first bad row: its range, its line in the range, and the reason."""
    first: BadRow | None = None
    """The first bad row with its line in the file; set once all ranges have been surveyed."""
    statistics: RowStatistics = field(default_factory=RowStatistics)

    def add(self, other: RangeSurvey) -> None:
        """Add the survey of later ranges to this one."""
        self.counts |= other.counts
        self.digests |= other.digests
        self.by_prompt = heapq.nsmallest(_HASHES_KEPT, self.by_prompt + other.by_prompt)
        self.by_content = heapq.nsmallest(_HASHES_KEPT, self.by_content + other.by_content)
        self.source = min(self.source, other.source)
        self.found |= other.found
        self.bad += other.bad
        self.statistics.add(other.statistics)
        self.first_bad = self.first_bad or other.first_bad


SurveyBatch = Callable[[list[int]], RangeSurvey]
MapBatches = Callable[[SurveyBatch, Sequence[list[int]]], Iterable[RangeSurvey]]
"""Calls a function with each batch of range numbers; the results come in the batches' order."""


def survey_corpus(
    config: DataConfig, map_batches: MapBatches = map, objective: Objective = SFT
) -> Corpus:
    """Return the corpus of a streamed data set: `eval` complete, `train` a sample of `stream`.

    The samples whose prompts have the smallest hashes are held out: round(val_size * n), at most
    `MAX_HELD_OUT`; samples with the same prompt stay together. Raises DataError, also for the first
    bad row, before anything is trained.
    """
    if config.path == "pydocs" or config.max_samples is not None:
        what = "data.path=pydocs" if config.path == "pydocs" else "data.max_samples"
        raise DataError(
            f"data.streaming=true: {what} makes a set that fits into memory; leave one of the two"
        )
    selection = find_splits(config)
    ranges = file_ranges(selection.train)
    shape = detect_shape(_first_rows(config, selection, selection.train, ranges), config)
    check_shape(config, shape, objective)
    if selection.eval is None:
        train = _survey_all(config, ranges, shape, map_batches)
        stream, held_out = _hold_out(config, ranges, shape, train)
        return _corpus(config, selection, stream, [train], held_out)
    eval_ranges = file_ranges(selection.eval)
    _first_rows(config, selection, selection.eval, eval_ranges)
    alternative = alternative_to(selection.eval, selection)
    evaluated = _survey_all(config, eval_ranges, shape, map_batches, alternative=alternative)
    held_out = evaluated.by_content[:MAX_HELD_OUT]
    wanted = frozenset(each.hash for each in held_out)
    train = _survey_all(config, ranges, shape, map_batches, wanted)
    stream = Stream(
        shape=shape,
        ranges=tuple(ranges),
        rows=tuple(train.counts[n] for n in range(len(ranges))),
        eval_hash_limit="",  # less than every hash: all of the train split is trained on
        hashes_prompt=False,
        bad_rows=train.bad + evaluated.bad,
        ignore=train.statistics.ignore,
    )
    return _corpus(config, selection, stream, [train, evaluated], held_out)


def _survey_all(
    config: DataConfig,
    ranges: Sequence[FileRange],
    shape: str,
    map_batches: MapBatches,
    wanted: frozenset[str] = frozenset(),
    alternative: str = "",
) -> RangeSurvey:
    """Survey all ranges; raises DataError for bad rows unless they are to be skipped."""
    ignore = frozenset(config.ignore_columns)
    total = RangeSurvey(statistics=RowStatistics(ignore))
    survey_batch = partial(survey_ranges, ranges, shape, ignore, wanted=wanted)
    for survey in map_batches(survey_batch, _batches(ranges)):
        total.add(survey)
    rows = sum(total.counts.values())
    if total.first_bad is not None:
        number, line, reason = total.first_bad
        line += count_lines_before(ranges, ranges[number])
        total.first = BadRow(ranges[number].file, line, reason)
        if not rows:
            raise no_valid_row_error(config, total.first, alternative)
        if config.on_bad_row == "error":
            raise bad_rows_error(total.first, total.bad, rows + total.bad)
    return total


def survey_ranges(
    ranges: Sequence[FileRange],
    shape: str,
    ignore: frozenset[str],
    numbers: Sequence[int],
    wanted: frozenset[str] = frozenset(),
) -> RangeSurvey:
    """Survey the ranges of these numbers, looking for samples with the `wanted` content hashes."""
    survey = RangeSurvey(statistics=RowStatistics(ignore))
    by_prompt, by_content = _SmallestHashes(), _SmallestHashes()
    for number in numbers:
        digest, count = hashlib.sha256(), 0
        for row in read_range(ranges[number], ignore):
            example = survey.statistics.convert(row, shape)
            if not isinstance(example, Example):
                survey.bad += 1
                survey.first_bad = survey.first_bad or (number, row.line, example)
                continue
            content = example.canonical()
            count += 1
            digest.update(f"{content}\n".encode())
            survey.source = min(survey.source, content_hash(ORDER_SALT, content))
            prompt_hash = content_hash(EVAL_SALT, example.canonical_prompt())
            by_prompt.add(HashedExample(prompt_hash, number, content))
            eval_hash = content_hash(EVAL_SALT, content)
            by_content.add(HashedExample(eval_hash, number, content))
            if eval_hash in wanted:
                survey.found.add(eval_hash)
        survey.counts[number], survey.digests[number] = count, digest.hexdigest()
    survey.by_prompt, survey.by_content = by_prompt.smallest(), by_content.smallest()
    return survey


class _SmallestHashes:
    """Collects the examples with the smallest hashes, holding a few times as many at most."""

    def __init__(self) -> None:
        self._held: list[HashedExample] = []
        self._largest: HashedExample | None = None

    def add(self, example: HashedExample) -> None:
        if self._largest is None or example < self._largest:
            self._held.append(example)
            if len(self._held) > 4 * _HASHES_KEPT:
                self._held = self.smallest()
                self._largest = self._held[-1]

    def smallest(self) -> list[HashedExample]:
        return heapq.nsmallest(_HASHES_KEPT, self._held)


def _hold_out(
    config: DataConfig, ranges: Sequence[FileRange], shape: str, survey: RangeSurvey
) -> tuple[Stream, Sequence[HashedExample]]:
    """Return the stream of data without an evaluation split, and the samples held out of it."""
    rows = sum(survey.counts.values())
    if rows < 2 or len({each.content for each in survey.by_content}) == 1:
        raise DataError(
            f"data.path: '{config.path}' has {rows} usable rows, and not two different ones; "
            "training and evaluation need at least 2"
        )
    count = min(max(round(config.val_size * rows), 1), rows - 1, MAX_HELD_OUT)
    held_out = _first_groups(survey.by_prompt, count)
    hashes_prompt = bool(held_out)
    # Where not even one prompt's samples fit, only equal samples are kept together instead.
    held_out = held_out or _first_groups(survey.by_content, count)
    held_out = held_out or [e for e in survey.by_content if e.hash == survey.by_content[0].hash]
    if len(held_out) == len(survey.by_content):
        raise DataError(
            f"data.path: '{config.path}': almost all of its {rows} rows are the same; "
            "give different ones"
        )
    taken = Counter(each.number for each in held_out)
    stream = Stream(
        shape=shape,
        ranges=tuple(ranges),
        rows=tuple(survey.counts[n] - taken[n] for n in range(len(ranges))),
        eval_hash_limit=held_out[-1].hash,
        hashes_prompt=hashes_prompt,
        bad_rows=survey.bad,
        ignore=survey.statistics.ignore,
    )
    return stream, held_out


def _corpus(
    config: DataConfig,
    selection: SplitSelection,
    stream: Stream,
    surveys: Sequence[RangeSurvey],
    held_out: Sequence[HashedExample],
) -> Corpus:
    """Build the corpus from the surveys of the train split and of the eval split, if any."""
    digest = hashlib.sha256(f"{stream.eval_hash_limit} {stream.hashes_prompt}\n".encode())
    statistics = RowStatistics(frozenset(config.ignore_columns))
    for survey in surveys:
        digest.update(b"eval\n" if survey is not surveys[0] else b"")
        for number in sorted(survey.digests):
            digest.update(survey.digests[number].encode())
        statistics.add(survey.statistics)
    statistics.check_ignored()
    examples = (Example.from_canonical(each.content) for each in surveys[0].by_content)
    sample = itertools.islice((e for e in examples if not stream.is_held_out(e)), _SAMPLED)
    bad = tuple(survey.first for survey in surveys if survey.first is not None)
    common = sum(each.hash in surveys[0].found for each in held_out)
    return Corpus(
        train=tuple(sample),
        eval=tuple(Example.from_canonical(each.content) for each in held_out),
        shape=stream.shape,
        digest=digest.hexdigest()[:32],
        source=min(survey.source for survey in surveys)[:32],
        skipped=bad,
        eval_split=selection.eval_split,
        eval_rows_in_train=common,
        notes=(
            *selection.notes(sum(stream.rows), len(held_out), common, config.val_size),
            *statistics.notes(stream.bad_rows, bad[0] if bad else None),
        ),
        stream=stream,
    )


def _first_groups(ordered: Sequence[HashedExample], most: int) -> Sequence[HashedExample]:
    """Return the first examples, at most `most`; of those with the same hash, all or none."""
    count = min(most, len(ordered))
    while 0 < count < len(ordered) and ordered[count - 1].hash == ordered[count].hash:
        count -= 1
    return ordered[:count]


def _batches(ranges: Sequence[FileRange]) -> list[list[int]]:
    """Return the ranges' numbers in batches of about 32 MB of lines, or of one row group, each."""
    batches: list[list[int]] = []
    size = _BATCH_BYTES
    for number, file_range in enumerate(ranges):
        if size >= _BATCH_BYTES or file_range.is_parquet:
            batches.append([])
            size = 0
        batches[-1].append(number)
        size += file_range.stop - file_range.start
    return batches


def _first_rows(
    config: DataConfig, selection: SplitSelection, split: Split, ranges: Sequence[FileRange]
) -> list[Row]:
    ignore = frozenset(config.ignore_columns)
    rows = itertools.chain.from_iterable(read_range(each, ignore) for each in ranges)
    found = list(itertools.islice(rows, _ROWS_TO_DETECT_SHAPE))
    if not found:
        raise empty_split_error(config, split, alternative_to(split, selection))
    return found
