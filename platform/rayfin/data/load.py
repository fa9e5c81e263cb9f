"""Load a corpus: read the rows, convert them to examples, sample, and hold rows out."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
from rayfin.data.pydocs import pydocs_examples
from rayfin.data.rows import BadRow
from rayfin.data.sources import find_splits, read_rows
from rayfin.data.splits import SplitSelection
from rayfin.data.survey import survey_corpus
from rayfin.errors import DataError
from rayfin.objectives import SFT, Objective
from rayfin.samples import Example


def load_corpus(config: DataConfig, objective: Objective = SFT) -> Corpus:
    """Return the samples of `config.path`, sampled and split the same way every time.

    The data's own splits are those that `find_splits` returns; for data without any, see
    `hold_out`. Order and split depend on the samples' content only, never on their order in the
    files: they are sorted by a hash of the content, and `max_samples` keeps the first of each
    split. That is a random sample, whereas the head of a file may hold a single class. With
    `config.streaming` the corpus is what `survey_corpus` returns. Raises DataError, also for rows
    of a format that `objective` can't train on.
    """
    if config.streaming:
        return survey_corpus(config, objective=objective)
    selection, statistics = find_splits(config), RowStatistics(frozenset(config.ignore_columns))
    if config.path == "pydocs":
        samples = _Samples(tuple(pydocs_examples()), (), "messages")
    else:
        samples = _convert_splits(config, selection, statistics, objective)
    statistics.check_ignored()
    return _corpus(config, selection, samples, statistics)


@dataclass(frozen=True)
class _Samples:
    """The samples of both splits, in the order of their files."""

    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    shape: str
    skipped: tuple[BadRow, ...] = ()


def _corpus(
    config: DataConfig, selection: SplitSelection, samples: _Samples, statistics: RowStatistics
) -> Corpus:
    if len(samples.train + samples.eval) < 2:
        raise DataError(
            f"data.path: '{config.path}' has {len(samples.train)} usable row; "
            "training and evaluation need at least 2"
        )
    all_train, all_eval = _ordered(samples.train), _ordered(samples.eval)
    train, held_out = all_train[: config.max_samples], all_eval[: config.max_samples]
    if selection.eval is not None:
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
    source = min(_order_key(each) for each in all_train[:1] + all_eval[:1])[:32]
    bad = samples.skipped
    return Corpus(
        train,
        held_out,
        samples.shape,
        _digest(train, held_out),
        source,
        bad,
        eval_split=selection.eval_split,
        eval_rows_in_train=common,
        notes=(
            *selection.notes(len(train), len(held_out), common, config.val_size),
            *statistics.notes(sum(each.rows for each in bad), bad[0] if bad else None),
        ),
    )


def _ordered(examples: Sequence[Example]) -> tuple[Example, ...]:
    return tuple(sorted(examples, key=_order_key))


def _order_key(example: Example) -> str:
    """Return the hash by which examples are ordered."""
    return content_hash(ORDER_SALT, example.canonical())


def hold_out(
    examples: Sequence[Example], val_size: float
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Divide examples into (train, eval), each in the given order.

    The evaluation split gets round(val_size * n) of the n samples, at least 1 and at most n - 1.
    Samples with the same prompt stay together, as a model would otherwise know the answer from
    training. Prompts are taken in the order of their hash, so that new samples move few old ones; a
    prompt whose samples would not all fit is passed over. Where all prompts are equal, equal
    samples stay together instead; at least two samples must differ.
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


def _convert_splits(
    config: DataConfig,
    selection: SplitSelection,
    statistics: RowStatistics,
    objective: Objective,
) -> _Samples:
    shape = ""
    found: list[tuple[Example, ...]] = []
    bad: list[BadRow] = []
    for split in filter(None, (selection.train, selection.eval)):
        rows = list(read_rows(split, statistics.ignore))
        if not rows:
            raise empty_split_error(config, split, alternative_to(split, selection))
        shape = shape or detect_shape(rows, config)
        check_shape(config, shape, objective)
        examples, before = list[Example](), len(bad)
        for row in rows:
            example = statistics.convert(row, shape)
            if isinstance(example, Example):
                examples.append(example)
            else:
                bad.append(BadRow(row.file, row.line, example, row.rows))
        if not examples:
            raise no_valid_row_error(config, bad[before], alternative_to(split, selection))
        found.append(tuple(examples))
    if bad and config.on_bad_row == "error":
        raise bad_rows_error(bad[0], sum(each.rows for each in bad), statistics.rows)
    train, held_out = found if selection.eval else (found[0], ())
    return _Samples(train, held_out, shape, tuple(bad))


def _digest(train: Sequence[Example], held_out: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for name, examples in (("train", train), ("eval", held_out)):
        digest.update(f"{name} {len(examples)}\n".encode())
        for example in examples:
            digest.update(f"{example.canonical()}\n".encode())
    return digest.hexdigest()[:32]
