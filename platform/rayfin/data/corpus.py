"""From `data.path` to a split corpus: read, bring to normal form, sample, hold out."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rayfin.config.schema import DataConfig
from rayfin.data.examples import BadRow, Corpus, Example
from rayfin.data.normal import (
    EVAL_SALT,
    ORDER_SALT,
    Census,
    bad_rows,
    content_hash,
    is_preference,
    no_known_column,
    no_valid_row,
)
from rayfin.data.pydocs import pydocs_examples
from rayfin.data.rows import Row
from rayfin.data.shapes import fitting_shape, nearest_shape
from rayfin.data.sources import read_rows, sources_of
from rayfin.data.splits import Sources, Split
from rayfin.errors import DataError


def load_corpus(config: DataConfig) -> Corpus:
    """The samples behind `config.path`, sampled and split the same way every time.

    The data's own splits are what `sources_of` finds; of data without them, see `hold_out`. Order
    and split depend on the samples' content only, never on their order in the files: sorted by a
    hash of the content, `max_samples` keeps the first of each split (a random sample, where the
    head of a file may hold one class only). With `config.streaming` it is what `survey_corpus`
    finds. Raises DataError.
    """
    if config.streaming:
        from rayfin.data.survey import survey_corpus

        return survey_corpus(config)
    sources, census = sources_of(config), Census(frozenset(config.ignore_columns))
    if config.path == "pydocs":
        samples = _Samples(tuple(pydocs_examples()), (), "messages")
    else:
        samples = _normal_form(config, sources, census)
    census.check_ignored()
    return _corpus(config, sources, samples, census)


@dataclass(frozen=True)
class _Samples:
    """All samples of the splits that are used, in the order of their files."""

    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    shape: str
    skipped: tuple[BadRow, ...] = ()


def _corpus(config: DataConfig, sources: Sources, samples: _Samples, census: Census) -> Corpus:
    if len(samples.train + samples.eval) < 2:
        raise DataError(
            f"data.path: '{config.path}' has {len(samples.train)} usable row; "
            "training and evaluation need at least 2"
        )
    whole, own = _ordered(samples.train), _ordered(samples.eval)
    train, held_out = whole[: config.max_samples], own[: config.max_samples]
    if sources.eval is not None:
        trained = {example.canonical() for example in train}
        common = sum(example.canonical() in trained for example in held_out)
    elif len({example.canonical() for example in train}) == 1:
        raise DataError(
            f"data.path: '{config.path}': all {len(train)} rows are the same; "
            "give at least 2 different ones"
        )
    else:
        train, held_out = hold_out(train, config.val_size)
        common = 0
    # The first sample is in every subset, and few new ones of a growing file come before it: the
    # share of equal first samples is that of common samples (MinHash; Broder 1997).
    source = min(_place(each) for each in whole[:1] + own[:1])[:32]
    bad = samples.skipped
    return Corpus(
        train,
        held_out,
        samples.shape,
        _digest(train, held_out),
        source,
        bad,
        eval_split=sources.eval_split,
        eval_rows_in_train=common,
        notes=(
            *sources.notes(len(train), len(held_out), common, config.val_size),
            *census.notes(sum(each.rows for each in bad), bad[0] if bad else None),
        ),
    )


def _ordered(examples: Sequence[Example]) -> tuple[Example, ...]:
    return tuple(sorted(examples, key=_place))


def _place(example: Example) -> str:
    """What an example's place in the order of all is by."""
    return content_hash(ORDER_SALT, example.canonical())


def hold_out(
    examples: Sequence[Example], val_size: float
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(train, eval), each in the given order; eval has round(val_size * n) samples, 1 to n - 1.

    Samples with the same prompt stay together, or a model could know the answer from training.
    Prompts are taken in the order of their hash, so that new samples move few old ones; one whose
    samples would not all fit is passed over. Where all prompts are the same, whole samples are
    kept together instead; at least two must differ.
    """
    keyed: Callable[[Example], str] = Example.canonical_prompt
    if len({keyed(example) for example in examples}) == 1:
        keyed = Example.canonical
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[content_hash(EVAL_SALT, keyed(example))].append(example)
    wanted = min(max(round(val_size * len(examples)), 1), len(examples) - 1)
    held: set[str] = set()
    taken = 0
    for key in sorted(groups):
        if taken + len(groups[key]) <= wanted:
            held.add(key)
            taken += len(groups[key])
    if not held:
        held.add(min(groups, key=lambda key: (len(groups[key]), key)))
    is_held = [content_hash(EVAL_SALT, keyed(example)) in held for example in examples]
    pairs = list(zip(examples, is_held, strict=True))
    return tuple(e for e, held in pairs if not held), tuple(e for e, held in pairs if held)


def _normal_form(config: DataConfig, sources: Sources, census: Census) -> _Samples:
    shape = ""
    found: list[tuple[Example, ...]] = []
    bad: list[BadRow] = []
    for split in filter(None, (sources.train, sources.eval)):
        rows = list(read_rows(split, census.ignore))
        if not rows:
            raise is_empty(config, split, instead_of(split, sources))
        shape = shape or shape_of(rows, config)
        if shape == "preference":
            raise is_preference(config.path)
        examples, before = list[Example](), len(bad)
        for row in rows:
            example = census.example_or_reason(row, shape)
            if isinstance(example, Example):
                examples.append(example)
            else:
                bad.append(BadRow(row.file, row.line, example, row.rows))
        if not examples:
            raise no_valid_row(config, bad[before], instead_of(split, sources))
        found.append(tuple(examples))
    if bad and config.on_bad_row == "error":
        raise bad_rows(bad[0], sum(each.rows for each in bad), census.rows)
    train, held_out = found if sources.eval else (found[0], ())
    return _Samples(train, held_out, shape, tuple(bad))


def is_empty(config: DataConfig, split: Split, instead: str) -> DataError:
    """What is said of a split without a row."""
    which = f": split {split.name} ({split.shown})" if split.name else ""
    return DataError(
        f"data.path: '{config.path}'{which} is empty; give a source that has rows{instead}"
    )


def instead_of(split: Split, sources: Sources) -> str:
    """What else can be done where a split has no row that can be used."""
    if split is not sources.eval:
        return ""
    return f"; data.split={sources.train.name} evaluates on rows held out of training instead"


def shape_of(rows: Sequence[Row], config: DataConfig) -> str:
    """The format that was given, or else that of the first row that has one."""
    if config.format != "auto":
        return config.format
    ignore = frozenset(config.ignore_columns)
    for row in rows:
        if row.problem is None and (shape := fitting_shape(row.value, ignore)):
            return shape
    # Nothing fits: say what is wrong by the shape that the first row seems to be meant as.
    first = rows[0]
    if first.problem is None and (near := nearest_shape(first.value, ignore)):
        reason = str(Census(ignore).example_or_reason(first, near))
    else:
        reason = first.problem or no_known_column(first.value)
    raise no_valid_row(config, BadRow(first.file, first.line, reason))


def _digest(train: Sequence[Example], held_out: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for name, examples in (("train", train), ("eval", held_out)):
        digest.update(f"{name} {len(examples)}\n".encode())
        for example in examples:
            digest.update(f"{example.canonical()}\n".encode())
    return digest.hexdigest()[:32]
