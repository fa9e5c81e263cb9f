"""How many samples of each source are taken, by the weights of the sources, and what is said of it.

A source's weight is the relative probability of drawing a sample from it, as in the `datasets`
library's `interleave_datasets`, and an epoch ends where the first source is exhausted: no sample
is taken twice, and of the other sources so many are taken that the shares are those of the weights.
Without weights all samples of all sources are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from rayfin.data.sources import Sources
from rayfin.data.splits import common_rows, count_rows, unused_val_size
from rayfin.errors import DataError


@dataclass(frozen=True)
class SourceUse:
    """What is taken of one source."""

    path: str
    """The path of the source, as the user gave it."""
    rows: int
    """The number of usable rows, without those of a split of its own to evaluate on."""
    train: int
    """The number of samples that an epoch trains on."""
    eval: int
    """The number of samples that are evaluated on."""
    share: float
    """The share of the samples that an epoch trains on."""


def samples_to_take(
    rows: Sequence[int], weights: Sequence[float | None], most: int | None = None
) -> list[int]:
    """Return how many of the rows of each source are taken, `most` in all.

    The numbers are in proportion to the weights, or to `rows` where there are none, and as large as
    the source that is exhausted first allows. Where `most` is less, they add up to it, by the
    largest remainders.
    """
    parts = [Fraction(n if w is None else str(w)) for n, w in zip(rows, weights, strict=True)]
    whole = sum(parts)
    if not whole:
        return [0] * len(rows)
    scale = min(n / part for n, part in zip(rows, parts, strict=True) if part)
    taken = [int(part * scale + Fraction(1, 2)) for part in parts]
    total = sum(taken)
    if most is None or most >= total:
        return taken
    total = most
    exact = [total * part / whole for part in parts]
    taken = [int(each) for each in exact]
    by_remainder = sorted(range(len(rows)), key=lambda i: (taken[i] - exact[i], -rows[i], i))
    for index in by_remainder[: total - sum(taken)]:
        taken[index] += 1
    return taken


def training_samples(sources: Sources, rows: Sequence[int], most: int | None) -> list[int]:
    """Return how many of the rows of each source are taken, as `samples_to_take` does.

    Raises DataError where that leaves out a source altogether.
    """
    taken = samples_to_take(rows, [source.weight for source in sources.train], most)
    for source, count in zip(sources.train, taken, strict=True):
        if not count:
            limit = "" if source.weight is None else f"weight {source.weight:g} "
            raise DataError(
                f"{source.setting}: {limit}leaves no row of '{source.config.path}' among "
                f"{count_rows(sum(taken))}; raise its weight or data.max_samples, or leave the "
                "source out"
            )
    return taken


def source_uses(
    sources: Sources, rows: Sequence[int], train: Sequence[int], evaluated: Sequence[int]
) -> tuple[SourceUse, ...]:
    """Return what is taken of each of several sources, given the numbers of their samples.

    For data.path alone it is empty.
    """
    if sources.train[0].setting == "data":
        return ()
    whole = sum(train)
    return tuple(
        SourceUse(source.config.path, n, trained, held, round(trained / whole, 4))
        for source, n, trained, held in zip(sources.train, rows, train, evaluated, strict=True)
    )


def source_hash(firsts: Sequence[str], rows: Sequence[int], taken: Sequence[int]) -> str:
    """Return a hash of the data, which two data sets share with the probability that they overlap.

    `firsts` are the smallest hashes of the samples of each source: equal ones come as often as
    samples are common (MinHash; Broder 1997). Of a source, of whose `rows` samples only some are
    `taken`, the smallest hash counts as one among so few.
    """
    scaled = (
        (Fraction(int(first, 16) * n, count), first)
        for first, n, count in zip(firsts, rows, taken, strict=True)
    )
    return min(scaled)[1][:32]


def eval_split_of(sources: Sources) -> str:
    """Return the name of the split that is evaluated on; of several sources, each name once."""
    if sources.evaluation is not None:
        return "eval_path"
    return " and ".join(dict.fromkeys(source.selection.eval_split for source in sources.train))


def source_notes(
    sources: Sources,
    uses: Sequence[SourceUse],
    *,
    trained: int,
    evaluated: int,
    common: int,
    val_size: float,
    dropped: Sequence[int] = (),
) -> list[str]:
    """Return a line on each use that is made of the rows of all sources.

    `trained` and `evaluated` are the numbers of samples, `common` those that are both,
    `val_size` is the setting, and `dropped` the number of samples of each source that are not used
    as another source's held-out samples have their prompts.
    """
    if not uses:
        selection = sources.train[0].selection
        return selection.notes(trained, evaluated, common, val_size)
    lines: list[str] = []
    titles, dropped = sources.titles(), dropped or [0] * len(uses)
    for source, use, title, shared in zip(sources.train, uses, titles, dropped, strict=True):
        selection = source.selection
        what = f" of {selection.train.description}" if selection.train.description else ""
        line = f"data: {title}: trains on {use.train} of {count_rows(use.rows)}{what}"
        line += f", {use.share:.1%} of an epoch".replace("%", " %")
        if selection.eval is not None:
            line += f"; evaluates on {count_rows(use.eval)} of {selection.eval.description}"
        elif sources.evaluation is None:
            line += f"; evaluates on {use.eval} held out"
        if shared:
            line += f"; {count_rows(shared)} left out, of prompts held out of another source"
        left = use.rows - use.train - shared - (use.eval if selection.eval is None else 0)
        if left and source.weight is not None:
            line += f"; {count_rows(left)} left out by weight {source.weight:g}"
        lines += [line, *(f"{note} (of {title})" for note in selection.unread_notes())]
    if sources.evaluation is not None:
        chosen = sources.evaluation.selection
        lines.append(
            f"data: evaluates on {count_rows(evaluated)} of {chosen.train.description} "
            "(data.eval_path)"
        )
        lines += chosen.unread_notes()
    if sources.evaluation is not None or all(source.selection.eval for source in sources.train):
        lines += unused_val_size(val_size)
    return [*lines, *common_rows(evaluated, common)]
