"""From `data.path` to a split corpus: read, bring to normal form, sample, hold out."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence

from rayfin.config.schema import DataConfig
from rayfin.data.examples import BadRow, Corpus, Example
from rayfin.data.pydocs import pydocs_examples
from rayfin.data.readers import read_rows
from rayfin.data.rows import Row
from rayfin.data.shapes import COLUMNS, RowProblem, fitting_shape, nearest_shape, to_example
from rayfin.errors import DataError

# Changing a salt changes every split that was ever made: histories would no longer compare.
_ORDER_SALT = "rayfin/order/1"
_EVAL_SALT = "rayfin/eval/1"


def load_corpus(config: DataConfig) -> Corpus:
    """The samples behind `config.path`, sampled and split the same way every time.

    Order and split depend on the samples' content only, never on their order in the files:
    sorted by a hash of the content, `max_samples` keeps the first (a random sample, where the head
    of a file may hold one class only); see `hold_out` for the split. Raises DataError.
    """
    skipped: list[BadRow] = []
    if config.path == "pydocs":
        examples, shape = list(pydocs_examples()), "messages"
    else:
        examples, shape, skipped = _normal_form(config)
    if len(examples) < 2:
        raise DataError(
            f"data.path: '{config.path}' has {len(examples)} usable row; "
            "training and evaluation need at least 2"
        )
    ordered = sorted(examples, key=lambda example: _hash(_ORDER_SALT, example.canonical()))
    kept = ordered[: config.max_samples]
    if len({example.canonical() for example in kept}) == 1:
        raise DataError(
            f"data.path: '{config.path}': all {len(kept)} rows are the same; "
            "give at least 2 different ones"
        )
    train, held_out = hold_out(kept, config.val_size)
    # The first sample is in every subset, and few new ones of a growing file come before it: the
    # share of equal first samples is that of common samples (MinHash; Broder 1997).
    source = _hash(_ORDER_SALT, ordered[0].canonical())[:32]
    return Corpus(train, held_out, shape, _digest(train, held_out), source, tuple(skipped))


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
        groups[_hash(_EVAL_SALT, keyed(example))].append(example)
    wanted = min(max(round(val_size * len(examples)), 1), len(examples) - 1)
    held: set[str] = set()
    taken = 0
    for key in sorted(groups):
        if taken + len(groups[key]) <= wanted:
            held.add(key)
            taken += len(groups[key])
    if not held:
        held.add(min(groups, key=lambda key: (len(groups[key]), key)))
    is_held = [_hash(_EVAL_SALT, keyed(example)) in held for example in examples]
    pairs = list(zip(examples, is_held, strict=True))
    return tuple(e for e, held in pairs if not held), tuple(e for e, held in pairs if held)


def _normal_form(config: DataConfig) -> tuple[list[Example], str, list[BadRow]]:
    rows = list(read_rows(config.path))
    if not rows:
        raise DataError(f"data.path: '{config.path}' is empty; give a source that has rows")
    shape = _shape_of(rows, config)
    if shape == "preference":
        raise DataError(
            f"data.path: '{config.path}' has preference pairs (chosen, rejected), which "
            "train.stage=sft can't train on; give the chosen answers as prompt and completion"
        )
    examples: list[Example] = []
    bad: list[BadRow] = []
    for row in rows:
        example = _example_or_reason(row, shape)
        if isinstance(example, Example):
            examples.append(example)
        else:
            bad.append(BadRow(row.file, row.line, example))
    if not examples:
        raise _no_valid_row(config, bad[0])
    if bad and config.on_bad_row == "error":
        count = f" ({len(bad)} of {len(rows)} rows are bad)" if len(bad) > 1 else ""
        raise DataError(
            f"data: {bad[0]}{count}; mend the file, or leave such rows out "
            "with data.on_bad_row=skip"
        )
    return examples, shape, bad


def _shape_of(rows: list[Row], config: DataConfig) -> str:
    if config.format != "auto":
        return config.format
    for row in rows:
        if row.problem is None and (shape := fitting_shape(row.value)):
            return shape
    # Nothing fits: say what is wrong by the shape that the first row seems to be meant as.
    first = rows[0]
    if first.problem is None and (near := nearest_shape(first.value)):
        reason = _example_or_reason(first, near)
    else:
        reason = first.problem or "none of the known columns"
    raise _no_valid_row(config, BadRow(first.file, first.line, str(reason)))


def _no_valid_row(config: DataConfig, first: BadRow) -> DataError:
    if config.format == "auto":
        need = " | ".join(", ".join(columns) for columns in COLUMNS.values())
    else:
        need = ", ".join(COLUMNS[config.format])
    return DataError(
        f"data.path: '{config.path}' has no valid row (the first: {first}); "
        f"give rows with the columns {need}"
    )


def _example_or_reason(row: Row, shape: str) -> Example | str:
    if row.problem is not None:
        return row.problem
    try:
        return to_example(row.value, shape)
    except RowProblem as problem:
        other = fitting_shape(row.value)
        if other is not None and other != shape:
            return f"has format {other}, but the data has format {shape}; all rows need the same"
        return str(problem)


def _hash(salt: str, content: str) -> str:
    return hashlib.sha256(f"{salt}\n{content}".encode()).hexdigest()


def _digest(train: Sequence[Example], held_out: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for name, examples in (("train", train), ("eval", held_out)):
        digest.update(f"{name} {len(examples)}\n".encode())
        for example in examples:
            digest.update(f"{example.canonical()}\n".encode())
    return digest.hexdigest()[:32]
