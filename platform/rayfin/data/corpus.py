"""From `data.path` to a split corpus: read, bring to normal form, sample, hold out."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence

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
from rayfin.data.readers import read_rows
from rayfin.data.rows import Row
from rayfin.data.shapes import fitting_shape, nearest_shape
from rayfin.errors import DataError


def load_corpus(config: DataConfig) -> Corpus:
    """The samples behind `config.path`, sampled and split the same way every time.

    Order and split depend on the samples' content only, never on their order in the files:
    sorted by a hash of the content, `max_samples` keeps the first (a random sample, where the head
    of a file may hold one class only); see `hold_out` for the split. With `config.streaming` it is
    what `survey_corpus` finds. Raises DataError.
    """
    if config.streaming:
        from rayfin.data.survey import survey_corpus

        return survey_corpus(config)
    census, skipped = Census(frozenset(config.ignore_columns)), list[BadRow]()
    if config.path == "pydocs":
        examples, shape = list(pydocs_examples()), "messages"
    else:
        examples, shape, skipped = _normal_form(config, census)
    census.check_ignored()
    if len(examples) < 2:
        raise DataError(
            f"data.path: '{config.path}' has {len(examples)} usable row; "
            "training and evaluation need at least 2"
        )
    ordered = sorted(examples, key=lambda example: content_hash(ORDER_SALT, example.canonical()))
    kept = ordered[: config.max_samples]
    if len({example.canonical() for example in kept}) == 1:
        raise DataError(
            f"data.path: '{config.path}': all {len(kept)} rows are the same; "
            "give at least 2 different ones"
        )
    train, held_out = hold_out(kept, config.val_size)
    # The first sample is in every subset, and few new ones of a growing file come before it: the
    # share of equal first samples is that of common samples (MinHash; Broder 1997).
    source = content_hash(ORDER_SALT, ordered[0].canonical())[:32]
    return Corpus(
        train,
        held_out,
        shape,
        _digest(train, held_out),
        source,
        tuple(skipped),
        census.notes(sum(each.rows for each in skipped), skipped[0] if skipped else None),
    )


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


def _normal_form(config: DataConfig, census: Census) -> tuple[list[Example], str, list[BadRow]]:
    rows = list(read_rows(config.path, census.ignore))
    if not rows:
        raise DataError(f"data.path: '{config.path}' is empty; give a source that has rows")
    shape = shape_of(rows, config)
    if shape == "preference":
        raise is_preference(config.path)
    examples: list[Example] = []
    bad: list[BadRow] = []
    for row in rows:
        example = census.example_or_reason(row, shape)
        if isinstance(example, Example):
            examples.append(example)
        else:
            bad.append(BadRow(row.file, row.line, example, row.rows))
    if not examples:
        raise no_valid_row(config, bad[0])
    if bad and config.on_bad_row == "error":
        raise bad_rows(bad[0], sum(each.rows for each in bad), census.rows)
    return examples, shape, bad


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
