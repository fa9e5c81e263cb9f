"""One pass over data that is too large to hold: what is in it, and what is held out."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rayfin.config.data import DataConfig
from rayfin.data.conversion import RowStatistics
from rayfin.data.corpus import Corpus
from rayfin.data.mixture import (
    eval_split_of,
    samples_to_take,
    source_hash,
    source_notes,
    source_uses,
    training_samples,
)
from rayfin.data.range_survey import MAX_HELD_OUT, SAMPLED, HashedExample
from rayfin.data.row_settings import RowSettings
from rayfin.data.sources import Sources, find_sources
from rayfin.data.split_survey import MapBatches, SurveyedSplit, open_split, survey_split
from rayfin.data.stream import Stream, StreamSource
from rayfin.errors import DataError
from rayfin.objectives import SFT, Objective
from rayfin.samples import Example

_LEAST_OF_RANGE = 8
"""The samples that are at least taken of a range where only some of a source are: a range is read
as a whole, which is not worth it for fewer."""


def survey_corpus(
    config: DataConfig, map_batches: MapBatches = map, objective: Objective = SFT
) -> Corpus:
    """Return the corpus of a streamed data set: `eval` complete, `train` a sample of `stream`.

    Of each source without a split to evaluate on, the samples whose prompts have the smallest
    hashes are held out: round(val_size * n) of the n that are taken of it, at most `MAX_HELD_OUT`
    of all sources; samples with the same prompt stay together. Raises DataError, also for the
    first bad row, before anything is trained.
    """
    _check_large(config)
    sources = find_sources(config)
    opened = [
        open_split(source, source.selection.train, objective, number=number)
        for number, source in enumerate(sources.train)
    ]
    evaluated = _evaluated(sources, opened, objective, map_batches)
    wanted = frozenset(each.hash for split in evaluated for each in _scored(split))
    train = [survey_split(each, map_batches, wanted) for each in opened]
    rows = [split.rows for split in train]
    taken = training_samples(sources, rows, None)
    most = samples_to_take(taken, [None] * len(taken), MAX_HELD_OUT)
    own = {split.ranges[0].source for split in evaluated} if sources.evaluation is None else None
    parts = [
        _take(split, count, 0 if own is None or number in own else _to_hold_out(config, count, cap))
        for number, (split, count, cap) in enumerate(zip(train, taken, most, strict=True))
    ]
    if not evaluated and not any(part.held_out for part in parts):
        raise _nothing_held_out(config, train)
    return _corpus(config, sources, train, evaluated, parts, taken)


def _check_large(config: DataConfig) -> None:
    """Raise DataError for what makes a set that needs no streaming."""
    paths = [config.eval_path, *(source.path for source in config.sources)]
    if not config.sources:
        paths.append(config.path)
    small = "data.path=pydocs" if "pydocs" in paths else ""
    if config.max_samples is not None:
        small = small or "data.max_samples"
    if small:
        raise DataError(
            f"data.streaming=true: {small} makes a set that fits into memory; leave one of the two"
        )


def _evaluated(
    sources: Sources,
    train: Sequence[SurveyedSplit],
    objective: Objective,
    map_batches: MapBatches,
) -> list[SurveyedSplit]:
    """Return the splits that bring what is evaluated on, looked through."""
    if (chosen := sources.evaluation) is not None:
        opened = open_split(chosen, chosen.selection.train, objective)
        return [survey_split(opened, map_batches)]
    return [
        survey_split(
            open_split(each.source, split, objective, number=number, shape=each.shape), map_batches
        )
        for number, each in enumerate(train)
        if (split := each.source.selection.eval) is not None
    ]


def _scored(split: SurveyedSplit) -> list[HashedExample]:
    """Return the samples of a split that are evaluated on."""
    return split.survey.by_content[:MAX_HELD_OUT]


@dataclass(frozen=True)
class _Part:
    """What is taken of one source."""

    source: StreamSource
    rows: list[int]
    """The number of training samples of each of its ranges."""
    held_out: Sequence[HashedExample] = ()


def _to_hold_out(config: DataConfig, count: int, most: int) -> int:
    return min(max(round(config.val_size * count), 1), count - 1, max(most, 1))


def _take(split: SurveyedSplit, count: int, to_hold_out: int) -> _Part:
    """Return what is taken of a source: `count` samples, with those that are held out.

    Where samples can't be told apart, none is held out.
    """
    settings, survey = RowSettings.of(split.source.config), split.survey
    held_out: Sequence[HashedExample] = ()
    hashes_prompt = False
    if to_hold_out > 0 and len({each.content for each in survey.by_content}) > 1:
        held_out = _first_groups(survey.by_prompt, to_hold_out)
        hashes_prompt = bool(held_out)
        # Where not even one prompt's samples fit, only equal samples are kept together instead.
        held_out = held_out or _first_groups(survey.by_content, to_hold_out)
        first = survey.by_content[0].hash
        held_out = held_out or [each for each in survey.by_content if each.hash == first]
        if len(held_out) == len(survey.by_content):
            raise DataError(
                f"{split.source.setting}.path: '{split.source.config.path}': almost all of its "
                f"{split.rows} rows are the same; give different ones"
            )
    held = Counter(each.number for each in held_out)
    numbers = range(len(split.ranges))
    rows = _spread(
        [survey.counts[n] - held[n] for n in numbers],
        sorted(numbers, key=lambda n: survey.digests[n]),
        count - len(held_out),
    )
    limit = held_out[-1].hash if held_out else ""  # an empty one is less than every hash
    return _Part(StreamSource(split.shape, settings, limit, hashes_prompt), rows, held_out)


def _spread(rows: list[int], order: Sequence[int], wanted: int) -> list[int]:
    """Return how many of the rows of each range are taken, `wanted` in all.

    Ranges come in an order that depends on their content.
    """
    if wanted >= sum(rows):
        return rows
    taken = [0] * len(rows)
    most = max(_LEAST_OF_RANGE, -(-wanted // len(rows)))
    while wanted:
        for number in order:
            more = min(most, rows[number] - taken[number], wanted)
            taken[number] += more
            wanted -= more
    return taken


def _first_groups(ordered: Sequence[HashedExample], most: int) -> Sequence[HashedExample]:
    """Return the first examples, at most `most`; of those with the same hash, all or none."""
    count = min(most, len(ordered))
    while 0 < count < len(ordered) and ordered[count - 1].hash == ordered[count].hash:
        count -= 1
    return ordered[:count]


def _nothing_held_out(config: DataConfig, train: Sequence[SurveyedSplit]) -> DataError:
    """Return the error for data of which nothing can be held out."""
    if config.sources:
        return DataError(
            "data.sources: none has two different rows, of which one could be held out; give more "
            "rows, or rows to evaluate on as data.eval_path"
        )
    return DataError(
        f"data.path: '{config.path}' has {train[0].rows} usable rows, and not two different ones; "
        "training and evaluation need at least 2"
    )


def _corpus(
    config: DataConfig,
    sources: Sources,
    train: Sequence[SurveyedSplit],
    evaluated: Sequence[SurveyedSplit],
    parts: Sequence[_Part],
    taken: Sequence[int],
) -> Corpus:
    """Build the corpus from what was found in the sources and in what they are evaluated on."""
    every = [*train, *evaluated]
    statistics = RowStatistics(RowSettings.of(config))
    for split in every:
        statistics.add(split.survey.statistics)
    statistics.check_names()
    held_out = [list(part.held_out) for part in parts]
    for split in evaluated if sources.evaluation is None else ():
        held_out[split.ranges[0].source] = _scored(split)
    scored = sorted(itertools.chain.from_iterable(held_out))
    if sources.evaluation is not None:
        scored = _scored(evaluated[0])
    common = sum(any(each.hash in split.survey.found for split in train) for each in scored)
    rows = [split.rows for split in train]
    trained = [sum(part.rows) for part in parts]
    notes = source_notes(
        sources,
        uses := source_uses(sources, rows, trained, list(map(len, held_out))),
        trained=sum(trained),
        evaluated=len(scored),
        common=common,
        val_size=config.val_size,
    )
    stream = Stream(
        sources=tuple(part.source for part in parts),
        ranges=tuple(each for split in train for each in split.ranges),
        rows=tuple(count for part in parts for count in part.rows),
        bad_rows=sum(split.survey.bad for split in every),
    )
    bad = tuple(first for split in every if (first := split.survey.first) is not None)
    return Corpus(
        train=_sample(train, parts, trained),
        eval=tuple(Example.from_canonical(each.content) for each in scored),
        shape=", ".join(dict.fromkeys(split.shape for split in every)),
        digest=_digest(train, evaluated, parts),
        source=source_hash(_first_hashes(sources, train, evaluated), rows, taken),
        skipped=bad,
        eval_split=eval_split_of(sources),
        eval_rows_in_train=common,
        sources=uses,
        notes=(
            *notes,
            *_limit_notes(sources, evaluated, parts),
            *statistics.notes(stream.bad_rows, bad[0] if bad else None),
        ),
        stream=stream,
    )


def _first_hashes(
    sources: Sources, train: Sequence[SurveyedSplit], evaluated: Sequence[SurveyedSplit]
) -> list[str]:
    """Return the smallest hash of the samples of each source, its own evaluation split included."""
    firsts = [split.survey.source for split in train]
    for split in evaluated if sources.evaluation is None else ():
        number = split.ranges[0].source
        firsts[number] = min(firsts[number], split.survey.source)
    return firsts


def _limit_notes(
    sources: Sources, evaluated: Sequence[SurveyedSplit], parts: Sequence[_Part]
) -> list[str]:
    """Return a line on each thing that is not done because the data is large."""
    lines = [
        f"data: {split.rows - MAX_HELD_OUT} of the {split.rows} rows of "
        f"{split.split.description} are not evaluated on: of streamed data at most {MAX_HELD_OUT} "
        "are, chosen by their hash"
        for split in evaluated
        if split.rows > MAX_HELD_OUT
    ]
    if len(parts) > 1 and any(part.held_out for part in parts):
        lines.append(
            "data: not looked for, as the data is streamed: rows held out of one source that "
            "another one trains on; where sources overlap, give data.eval_path"
        )
    return lines


def _digest(
    train: Sequence[SurveyedSplit], evaluated: Sequence[SurveyedSplit], parts: Sequence[_Part]
) -> str:
    """Return a hash of all samples, in their order, and of which of them are trained on."""
    digest = hashlib.sha256()
    for split, part in zip(train, parts, strict=True):
        digest.update(f"{part.source.eval_hash_limit} {part.source.hashes_prompt}\n".encode())
        if len(parts) > 1:
            digest.update(f"{sum(part.rows)}\n".encode())
        _add_digests(digest.update, split)
    for split in evaluated:
        digest.update(b"eval\n")
        _add_digests(digest.update, split)
    return digest.hexdigest()[:32]


def _add_digests(add: Callable[[bytes], None], split: SurveyedSplit) -> None:
    for number in sorted(split.survey.digests):
        add(split.survey.digests[number].encode())


def _sample(
    train: Sequence[SurveyedSplit], parts: Sequence[_Part], trained: Sequence[int]
) -> tuple[Example, ...]:
    """Return some training samples of all sources, as many of each as it has in an epoch."""
    shares = samples_to_take(trained, [None] * len(trained), SAMPLED)
    found: list[Example] = []
    for split, part, most in zip(train, parts, shares, strict=True):
        examples = (Example.from_canonical(each.content) for each in split.survey.by_content)
        found += itertools.islice((e for e in examples if not part.source.is_held_out(e)), most)
    return tuple(found)
