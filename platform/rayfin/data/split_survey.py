"""Look through all rows of one split of a large data set."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rayfin.config.data import DataConfig
from rayfin.data.conversion import (
    RowStatistics,
    alternative_to,
    bad_rows_error,
    check_shape,
    empty_split_error,
    no_valid_row_error,
)
from rayfin.data.file_ranges import check_encoding, count_lines_before, file_ranges, read_range
from rayfin.data.range_survey import RangeSurvey, survey_ranges
from rayfin.data.row_settings import RowSettings
from rayfin.data.rows import BadRow, Row
from rayfin.data.sources import EVAL_PATH, Source
from rayfin.data.splits import Split
from rayfin.data.stream import FileRange, TakenRows
from rayfin.objectives import Objective

_BATCH_BYTES = 2**25
_ROWS_TO_DETECT_SHAPE = 1000

SurveyBatch = Callable[[list[int]], RangeSurvey]
MapBatches = Callable[[SurveyBatch, Sequence[list[int]]], Iterable[RangeSurvey]]
"""Calls a function with each batch of range numbers; the results come in the batches' order."""


@dataclass(frozen=True)
class SurveyedSplit:
    """A split, the ranges of its files, and what was found in them."""

    source: Source
    split: Split
    ranges: tuple[FileRange, ...]
    shape: str
    """The format of the rows, as `data.format` names it."""
    survey: RangeSurvey
    taken: TakenRows | None = None
    """Which samples the survey counts; None for all."""

    @property
    def rows(self) -> int:
        """The number of its valid rows."""
        return sum(self.survey.counts.values())


def open_split(
    source: Source, split: Split, objective: Objective, *, number: int = 0, shape: str = ""
) -> SurveyedSplit:
    """Return a split of which only the format of its rows is known, which is `shape` if given.

    `number` is that of the source. Raises DataError for an empty split, and for one that can't be
    read in parts, which only what data.eval_path names need not be.
    """
    with source.errors():
        ranges = file_ranges(split, source=number, whole=source.setting == EVAL_PATH)
        settings = RowSettings.of(source.config)
        check_encoding(ranges, settings)
        rows = itertools.chain.from_iterable(read_range(each, settings) for each in ranges)
        first: list[Row] = list(itertools.islice(rows, _ROWS_TO_DETECT_SHAPE))
        if not first:
            instead = alternative_to(split, source.selection)
            raise empty_split_error(source.config, split, instead)
        shape = shape or source.shape(first)
        check_shape(source.config, shape, objective)
    return SurveyedSplit(source, split, tuple(ranges), shape, RangeSurvey())


def survey_split(
    opened: SurveyedSplit,
    map_batches: MapBatches,
    wanted: frozenset[str] = frozenset(),
    *,
    with_orders: bool = False,
) -> SurveyedSplit:
    """Look through all ranges of a split, for samples with the `wanted` content hashes, too.

    `with_orders` is that of `survey_ranges`. Raises DataError for bad rows unless they are to be
    skipped.
    """
    total = survey_chosen(opened, map_batches, wanted=wanted, with_orders=with_orders)
    found = replace(opened, survey=total)
    if total.first_bad is not None:
        with opened.source.errors():
            _check_bad_rows(opened.source.config, found, total.first_bad)
    return found


def survey_chosen(split: SurveyedSplit, map_batches: MapBatches, **options: Any) -> RangeSurvey:
    """Look through all ranges of a split with these `options` of `survey_ranges`."""
    settings = RowSettings.of(split.source.config)
    total = RangeSurvey(statistics=RowStatistics(settings))
    survey_batch = partial(survey_ranges, split.ranges, split.shape, settings, **options)
    with split.source.errors():
        for survey in map_batches(survey_batch, _batches(split.ranges)):
            total.add(survey)
    return total


def survey_taken(
    split: SurveyedSplit, count: int, map_batches: MapBatches, wanted: frozenset[str]
) -> SurveyedSplit:
    """Return a split of which only the first `count` samples by their order's hash count."""
    if count >= split.rows:
        return split
    taken = _first_rows(split.survey.orders, count)
    again = survey_chosen(split, map_batches, wanted=wanted, chosen=taken.of_range)
    survey = replace(
        split.survey,
        counts=again.counts,
        by_prompt=again.by_prompt,
        by_content=again.by_content,
        found=again.found,
        orders={},
    )
    return replace(split, survey=survey, taken=taken)


def _first_rows(orders: Mapping[int, array[int]], count: int) -> TakenRows:
    """Return the first `count` samples by their order's hash; of equal ones those in front."""
    import numpy as np

    by_range = {n: np.frombuffer(orders[n], dtype=np.uint64) for n in sorted(orders) if orders[n]}
    every = np.concatenate([*by_range.values()])
    last = np.partition(every, count - 1)[count - 1]
    wanted = count - int(np.count_nonzero(every < last))
    equal = {n: int(np.count_nonzero(hashes == last)) for n, hashes in by_range.items()}
    so_far = zip(equal, itertools.accumulate(equal.values()), strict=True)
    number, seen = next(each for each in so_far if each[1] >= wanted)
    return TakenRows(int(last), number, wanted - (seen - equal[number]))


def _check_bad_rows(
    config: DataConfig, found: SurveyedSplit, first_bad: tuple[int, int, str]
) -> None:
    """Find the line of the first bad row; raises DataError where bad rows are not to be skipped."""
    number, line, reason = first_bad
    line += count_lines_before(found.ranges, found.ranges[number])
    total = found.survey
    total.first = BadRow(found.ranges[number].file, line, reason)
    if not found.rows:
        instead = alternative_to(found.split, found.source.selection)
        raise no_valid_row_error(config, total.first, instead)
    if config.on_bad_row == "error":
        raise bad_rows_error(total.first, total.bad, found.rows + total.bad)


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
