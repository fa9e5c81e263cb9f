"""Load a corpus: read the rows, convert them to examples, sample, and hold rows out."""

from __future__ import annotations

import gc
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rayfin.config.data import DataConfig
from rayfin.data.content_hash import EVAL_SALT, ORDER_SALT, content_hash, content_hashes
from rayfin.data.conversion import (
    RowStatistics,
    alternative_to,
    bad_rows_error,
    check_shape,
    empty_split_error,
    no_valid_row_error,
    printable,
)
from rayfin.data.corpus import Corpus
from rayfin.data.mixture import (
    eval_split_of,
    samples_to_take,
    source_hash,
    source_notes,
    source_uses,
    training_samples,
)
from rayfin.data.row_settings import RowSettings
from rayfin.data.rows import BadRow
from rayfin.data.sources import Source, Sources, find_sources, read_rows
from rayfin.data.splits import Split
from rayfin.data.stream_parts import all_held_out
from rayfin.data.survey import survey_corpus
from rayfin.errors import DataError
from rayfin.objectives import SFT, Objective
from rayfin.samples import Example


def load_corpus(config: DataConfig, objective: Objective = SFT) -> Corpus:
    """Return the samples of `config.path` or `config.sources`, the same way every time.

    The data's own splits are those that `find_sources` returns; for data without any, see
    `hold_out`. Order and split depend on the samples' content only, never on their order in the
    files: they are sorted by a hash of the content, and `max_samples` and the sources' weights
    keep the first of each split. That is a random sample, whereas the head of a file may hold a
    single class. With `config.streaming` the corpus is what `survey_corpus` returns. Raises
    DataError, also for rows of a format that `objective` can't train on.
    """
    if config.streaming:
        return survey_corpus(config, objective=objective)
    sources, reader = find_sources(config), _Reader(config, objective)
    with _no_garbage_collection():
        parts = [reader.source(source) for source in sources.train]
        evaluation = reader.evaluation(sources.evaluation)
        reader.finish()
        return _corpus(config, sources, parts, evaluation, reader)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep the collector of cycles away from samples, which have none.

    It would go through all that are held, again and again as they get more.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class _Samples:
    """The samples of one source, in their order."""

    train: tuple[Example, ...]
    eval: tuple[Example, ...] = ()
    """Those of its own evaluation split, if it has one."""


class _Reader:
    """Converts the rows of sources to samples, and remembers what is to be said of the rows."""

    def __init__(self, config: DataConfig, objective: Objective) -> None:
        self._config, self._objective = config, objective
        self.statistics = RowStatistics(RowSettings.of(config))
        self.bad: list[BadRow] = []
        self.shapes: dict[str, None] = {}
        """The formats of the rows, each once, in the order of the sources."""

    def source(self, source: Source) -> _Samples:
        """Return the samples of a source, with those of its own evaluation split."""
        selection = source.selection
        with source.errors():
            train, shape = self._split(source, selection.train)
            # What data.eval_path names may be of another format.
            if selection.eval is None or self._config.eval_path is not None:
                return _Samples(train)
            held_out, _ = self._split(source, selection.eval, shape)
            return _Samples(train, held_out)

    def evaluation(self, source: Source | None) -> tuple[Example, ...] | None:
        """Return the samples of data.eval_path, None where it is not given."""
        if source is None:
            return None
        with source.errors():
            return self._split(source, source.selection.train)[0]

    def finish(self) -> None:
        """Raise DataError for bad rows that are not to be skipped, or an unknown column."""
        if self.bad and self._config.on_bad_row == "error":
            count = sum(each.rows for each in self.bad)
            raise bad_rows_error(self.bad[0], count, self.statistics.rows)
        self.statistics.check_names()

    def notes(self) -> tuple[str, ...]:
        """Return a line on each thing that is to be said of the rows."""
        skipped = sum(each.rows for each in self.bad)
        return self.statistics.notes(skipped, self.bad[0] if self.bad else None)

    def _split(
        self, source: Source, split: Split, shape: str = ""
    ) -> tuple[tuple[Example, ...], str]:
        """Return the samples of a split and their format, which is `shape` where that is given."""
        statistics = RowStatistics(RowSettings.of(source.config))
        rows = list(read_rows(split, statistics.settings))
        alternative = alternative_to(split, source.selection)
        if not rows:
            raise empty_split_error(source.config, split, alternative)
        shape = shape or source.shape(rows)
        check_shape(source.config, shape, self._objective)
        self.shapes[shape] = None
        examples, before = list[Example](), len(self.bad)
        for row in rows:
            example = statistics.convert(row, shape)
            if isinstance(example, Example):
                examples.append(example)
            else:
                self.bad.append(BadRow(row.file, row.line, example, row.rows))
        self.statistics.add(statistics)
        if not examples:
            raise no_valid_row_error(source.config, self.bad[before], alternative)
        return _ordered(examples), shape


def _corpus(
    config: DataConfig,
    sources: Sources,
    parts: Sequence[_Samples],
    evaluation: tuple[Example, ...] | None,
    reader: _Reader,
) -> Corpus:
    rows = [len(part.train) for part in parts]
    taken = training_samples(sources, rows, config.max_samples)
    train = [part.train[:count] for part, count in zip(parts, taken, strict=True)]
    scored = samples_to_take(
        [len(part.eval) for part in parts], [None] * len(parts), config.max_samples
    )
    held_out = [part.eval[:count] for part, count in zip(parts, scored, strict=True)]
    dropped = [0] * len(parts)
    if evaluation is None:
        own = [bool(part.eval) for part in parts]
        pairs = _hold_out_of_each(config, train, own)
        train = [each for each, _ in pairs]
        left = zip(taken, pairs, strict=True)
        dropped = [count - len(kept) - len(held) for count, (kept, held) in left]
        held_out = [mine + held for mine, (_, held) in zip(held_out, pairs, strict=True)]
        if not any(held_out):
            raise _nothing_held_out(config, train, reader.statistics.unused)
    all_train, all_held = _joined(train), _joined(held_out)
    if evaluation is not None:
        all_held = evaluation[: config.max_samples]
    common = 0
    if len(parts) > 1 or parts[0].eval or evaluation is not None:
        trained = {example.canonical() for example in all_train}
        common = sum(example.canonical() in trained for example in all_held)
    uses = source_uses(sources, rows, list(map(len, train)), list(map(len, held_out)))
    notes = source_notes(
        sources,
        uses,
        trained=len(all_train),
        evaluated=len(all_held),
        common=common,
        val_size=config.val_size,
        dropped=dropped,
    )
    bad = tuple(reader.bad)
    firsts = [min(map(_order_key, part.train[:1] + part.eval[:1])) for part in parts]
    return Corpus(
        all_train,
        all_held,
        ", ".join(reader.shapes),
        _digest(all_train, all_held),
        source_hash(firsts, rows, taken),
        bad,
        eval_split=eval_split_of(sources),
        eval_rows_in_train=common,
        sources=uses,
        notes=(*notes, *reader.notes()),
    )


def _joined(parts: Sequence[tuple[Example, ...]]) -> tuple[Example, ...]:
    """Return the samples of several sources, each in order, in one order."""
    return parts[0] if len(parts) == 1 else _ordered(itertools.chain.from_iterable(parts))


def _ordered(examples: Iterable[Example]) -> tuple[Example, ...]:
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
    keyed = _group_key(examples)
    hashes = content_hashes(EVAL_SALT, map(keyed, examples))
    groups = Counter(hashes)
    wanted = min(max(round(val_size * len(examples)), 1), len(examples) - 1)
    held: set[str] = set()
    taken = 0
    for key in sorted(groups):
        if taken + groups[key] <= wanted:
            held.add(key)
            taken += groups[key]
    if not held:
        held.add(min(groups, key=lambda key: (groups[key], key)))
    pairs = list(zip(examples, (key in held for key in hashes), strict=True))
    return tuple(e for e, held in pairs if not held), tuple(e for e, held in pairs if held)


def _group_key(examples: Sequence[Example]) -> Callable[[Example], str]:
    """Return what is equal for examples that stay together: the prompt, unless it is always the
    same."""
    prompts = {example.canonical_prompt() for example in examples}
    return Example.canonical if len(prompts) == 1 else Example.canonical_prompt


def _hold_out_of_each(
    config: DataConfig, parts: Sequence[tuple[Example, ...]], own: Sequence[bool]
) -> list[tuple[tuple[Example, ...], tuple[Example, ...]]]:
    """Divide the samples of each source into (train, eval), but for sources with an `own` split.

    What is held out of one source is not trained on in another, either: there it is evaluated on,
    too, unless the source has a split of its own. Raises DataError where nothing is left to train
    on.
    """
    pairs = [
        hold_out(part, config.val_size)
        if not has_own and len({example.canonical() for example in part}) > 1
        else (part, ())
        for part, has_own in zip(parts, own, strict=True)
    ]
    if len(pairs) == 1:
        return pairs
    held = {
        key(example)
        for part, (_, held_out) in zip(parts, pairs, strict=True)
        for key in [_group_key(part)]
        for example in held_out
    }

    def without_held(train: tuple[Example, ...]) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        shared = [bool({e.canonical(), e.canonical_prompt()} & held) for e in train]
        both = list(zip(train, shared, strict=True))
        return tuple(e for e, moved in both if not moved), tuple(e for e, moved in both if moved)

    moved = [without_held(train) for train, _ in pairs]
    if not any(train for train, _ in moved):
        raise all_held_out()
    return [
        (train, held_out if has_own else held_out + more)
        for (_, held_out), (train, more), has_own in zip(pairs, moved, own, strict=True)
    ]


def _nothing_held_out(
    config: DataConfig, parts: Sequence[tuple[Example, ...]], unused: Iterable[str]
) -> DataError:
    """Return the error for data of which nothing can be held out."""
    if config.sources:
        return DataError(
            "data.sources: none has two different rows, of which one could be held out; give more "
            "rows, or rows to evaluate on as data.eval_path"
        )
    if len(parts[0]) < 2:
        return DataError(
            f"data.path: '{config.path}' has {len(parts[0])} usable row; "
            "training and evaluation need at least 2"
        )
    names = ", ".join(map(printable, sorted(unused)[:8]))
    not_used = f" (not used of them: {names})" if names else ""
    return DataError(
        f"data.path: '{config.path}': all {len(parts[0])} rows are the same{not_used}; "
        "give at least 2 different ones"
    )


def _digest(train: Sequence[Example], held_out: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for name, examples in (("train", train), ("eval", held_out)):
        digest.update(f"{name} {len(examples)}\n".encode())
        for example in examples:
            digest.update(f"{example.canonical()}\n".encode())
    return digest.hexdigest()[:32]
