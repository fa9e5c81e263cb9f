"""One pass over data that is too large to hold: what is in it, and what is held out."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence

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
from rayfin.data.split_survey import (
    MapBatches,
    SurveyedSplit,
    open_split,
    survey_split,
    survey_taken,
)
from rayfin.data.stream import Stream
from rayfin.data.stream_parts import StreamPart, most_to_hold_out, take, without_shared
from rayfin.errors import DataError
from rayfin.objectives import SFT, Objective
from rayfin.samples import Example


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
    weighted = sources.train[0].weight is not None
    surveyed = [survey_split(each, map_batches, wanted, with_orders=weighted) for each in opened]
    rows = [split.rows for split in surveyed]
    taken = training_samples(sources, rows, None)
    most = samples_to_take(taken, [None] * len(taken), MAX_HELD_OUT)
    train = [
        survey_taken(split, count, map_batches, wanted)
        for split, count in zip(surveyed, taken, strict=True)
    ]
    firsts = [0, *itertools.accumulate(len(split.ranges) for split in train)]
    if sources.evaluation is not None:
        most_held = [0] * len(train)
        own = frozenset[int]()
    else:
        own = frozenset(split.ranges[0].source for split in evaluated)
        most_held = [
            0 if number in own else most_to_hold_out(config, count, cap)
            for number, (count, cap) in enumerate(zip(taken, most, strict=True))
        ]
    parts = list(map(take, train, most_held, firsts))
    if not evaluated and not any(part.held_out for part in parts):
        raise _nothing_held_out(config, train)
    if len(parts) > 1:
        parts = without_shared(train, parts, map_batches, most=MAX_HELD_OUT, own=own)
    return _corpus(config, sources, train, evaluated, parts, rows, taken)


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
    parts: Sequence[StreamPart],
    rows: Sequence[int],
    taken: Sequence[int],
) -> Corpus:
    """Build the corpus from what was found in the sources and in what they are evaluated on.

    `rows` are the usable rows of each source, and `taken` those that are taken of it.
    """
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
    trained = [sum(part.rows) for part in parts]
    notes = source_notes(
        sources,
        uses := source_uses(sources, rows, trained, list(map(len, held_out))),
        trained=sum(trained),
        evaluated=len(scored),
        common=common,
        val_size=config.val_size,
        dropped=[part.shared for part in parts],
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
            *_limit_notes(evaluated),
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


def _limit_notes(evaluated: Sequence[SurveyedSplit]) -> list[str]:
    """Return a line on each thing that is not done because the data is large."""
    return [
        f"data: {split.rows - MAX_HELD_OUT} of the {split.rows} rows of "
        f"{split.split.description} are not evaluated on: of streamed data at most {MAX_HELD_OUT} "
        "are, chosen by their hash"
        for split in evaluated
        if split.rows > MAX_HELD_OUT
    ]


def _digest(
    train: Sequence[SurveyedSplit], evaluated: Sequence[SurveyedSplit], parts: Sequence[StreamPart]
) -> str:
    """Return a hash of all samples, in their order, and of which of them are trained on."""
    digest = hashlib.sha256()
    for split, part in zip(train, parts, strict=True):
        digest.update(f"{part.source.eval_hash_limit} {part.source.hashes_prompt}\n".encode())
        if len(parts) > 1:
            digest.update(f"{sum(part.rows)}\n".encode())
        if (taken := part.source.taken) is not None:
            digest.update(f"to {taken.last:016x}\n".encode())
        _add_digests(digest.update, split)
    for split in evaluated:
        digest.update(b"eval\n")
        _add_digests(digest.update, split)
    return digest.hexdigest()[:32]


def _add_digests(add: Callable[[bytes], None], split: SurveyedSplit) -> None:
    for number in sorted(split.survey.digests):
        add(split.survey.digests[number].encode())


def _sample(
    train: Sequence[SurveyedSplit], parts: Sequence[StreamPart], rows: Sequence[int]
) -> tuple[Example, ...]:
    """Return some training samples of all sources, as many of each as it has in an epoch."""
    shares = samples_to_take(rows, [None] * len(rows), SAMPLED)
    found: list[Example] = []
    for split, part, most in zip(train, parts, shares, strict=True):
        examples = (Example.from_canonical(each.content) for each in split.survey.by_content)
        trained = (e for e in examples if not part.source.is_held_out(*e.canonical_forms()))
        found += itertools.islice(trained, most)
    return tuple(found)
