"""Choose which rows to train and to evaluate on, by the names of files and splits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayfin.config.data import DataConfig
from rayfin.errors import DataError, did_you_mean, listed

KEYWORDS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training", "trainset"),
    "validation": ("validation", "valid", "val", "dev", "valset", "devset"),
    "eval": ("eval", "evaluation", "evalset"),
    "test": ("test", "testing", "testset"),
}
"""The words that name each kind of split; the first kind after train that is there is evaluated on.

These are the words of the datasets library (`datasets.data_files`), which counts eval as test and
has no words that end in set.
"""

HELD_OUT = "held_out"
"""The name of the evaluation split where its rows were held out of the training data."""

ALL = "all"
"""The value of data.split that joins all splits into one."""

# The datasets library's separators of words, and where a capital letter begins one.
_BETWEEN_WORDS = re.compile(r"[-._ 0-9]+|(?<=[a-z])(?=[A-Z])")


@dataclass(frozen=True)
class Split:
    """The rows of some files, or of a split of a hub data set."""

    name: str
    """Empty where no name says what the rows are for."""
    description: str
    """The files or the name, as messages call the split."""
    files: tuple[Path, ...] = ()
    tables: tuple[tuple[str, Iterable[Any]], ...] = ()
    """(name, rows) of those rows that are not in the user's files."""

    @property
    def kind(self) -> str | None:
        """The kind that the name stands for, or None where it stands for none or several."""
        found = kinds_in(self.name)
        return found[0] if len(found) == 1 else None

    @property
    def identity(self) -> frozenset[str]:
        """What the rows are read from: the same for the same files, by whatever paths."""
        return frozenset(
            [*(str(file.resolve()) for file in self.files), *(name for name, _ in self.tables)]
        )


@dataclass(frozen=True)
class SplitSelection:
    """The splits to train and to evaluate on, and those that are not read."""

    train: Split
    eval: Split | None = None
    """None where rows are held out of `train`."""
    unread: tuple[Split, ...] = ()
    """The splits that are neither trained nor evaluated on."""
    extra_notes: tuple[str, ...] = ()
    """Notes on files that are in no split."""

    @property
    def eval_split(self) -> str:
        """The name of the evaluation split."""
        return HELD_OUT if self.eval is None else self.eval.name

    def notes(self, train: int, evaluated: int, common: int, val_size: float) -> list[str]:
        """Return a line on each use that is made of the rows.

        `train` and `evaluated` are numbers of rows; `common` of those evaluated on are trained on,
        too; `val_size` is the setting.
        """
        return [
            *self._used(train, evaluated, val_size),
            *common_rows(evaluated, common),
            *self.unread_notes(),
        ]

    def unread_notes(self) -> list[str]:
        """Return a line on each split and file that is not read."""
        return [*map(_not_read, self.unread), *self.extra_notes]

    def _used(self, train: int, evaluated: int, val_size: float) -> list[str]:
        if self.eval is None:
            if not self.train.description:  # one file: there was nothing to choose
                return []
            return [
                f"data: trains on {count_rows(train)} of {self.train.description}, "
                f"evaluates on {count_rows(evaluated)} held out (data.val_size={val_size:g})"
            ]
        used = (
            f"data: trains on {count_rows(train)} of {self.train.description}, "
            f"evaluates on {count_rows(evaluated)} of {self.eval.description}"
        )
        return [used, *unused_val_size(val_size)]


def _not_read(split: Split) -> str:
    if not split.name:
        return (
            f"data: not read: {split.description}, whose names tell no split; "
            "data.split=all takes all files together"
        )
    return f"data: not read: {split.description}{f' (split {split.name})' if split.files else ''}"


def unused_val_size(val_size: float) -> list[str]:
    """Return a line on data.val_size where it was given and nothing is held out."""
    if val_size == DataConfig.model_fields["val_size"].default:
        return []
    return [f"data: data.val_size={val_size:g} has no effect: nothing is held out of training"]


def common_rows(evaluated: int, common: int) -> list[str]:
    """Return a line on the `common` of the rows evaluated on that are trained on, too, if any."""
    if not common:
        return []
    return [
        f"data: {common} of the {count_rows(evaluated)} evaluated on are trained on, too: "
        "the scores of these say nothing of new data"
    ]


def count_rows(count: int) -> str:
    """Return a number of rows in words."""
    return f"{count} row" if count == 1 else f"{count} rows"


def kinds_in(name: str) -> list[str]:
    """Return the kinds of splits whose words are in a name."""
    words = set(map(str.lower, _BETWEEN_WORDS.split(name)))
    return [kind for kind, known in KEYWORDS.items() if not words.isdisjoint(known)]


def joined(name: str, splits: Sequence[Split]) -> Split:
    """Return one split with the rows of several."""
    shown = [split.description for split in splits]
    return Split(
        name,
        listed(shown) + (" together" if len(shown) > 1 else ""),
        tuple(file for split in splits for file in split.files),
        tuple(table for split in splits for table in split.tables),
    )


def select_splits(
    path: str, splits: Sequence[Split], others: Sequence[Split], wanted: str | None
) -> SplitSelection:
    """Choose the splits to train and evaluate on from named `splits` and unnamed `others`.

    `wanted` is data.split. Without it, the train split is trained on, and the first of validation,
    eval and test that is there is evaluated on. Raises DataError where the choice is ambiguous.
    """
    everything = [*splits, *others]
    if wanted == ALL or (wanted is None and not splits):
        return SplitSelection(joined("", everything))
    if wanted is not None:
        return _only(path, splits, others, wanted)
    train = _of_kind(splits, "train")
    if not train:
        if len(everything) == 1 and splits[0].kind is None:
            return SplitSelection(splits[0])
        raise DataError(
            f"data.path: '{path}' has no train split, only {_names(everything)}; name what is to "
            f"be trained on train-..., or say with data.split={splits[0].name} which split is the "
            "whole data (all: all of them)"
        )
    if len(train) > 1:
        raise DataError(
            f"data.path: '{path}' has several train splits ({_names(train)}); say with "
            f"data.split={train[0].name} which one is the data (all: all splits together)"
        )
    for kind in list(KEYWORDS)[1:]:
        if evaluated := _of_kind(splits, kind):
            one = evaluated[0] if len(evaluated) == 1 else joined(kind, evaluated)
            break
    else:
        evaluated, one = [], None
    unread = [each for each in everything if each not in train and each not in evaluated]
    return SplitSelection(train[0], one, tuple(unread))


def select_evaluated(
    path: str, splits: Sequence[Split], others: Sequence[Split], wanted: str | None
) -> SplitSelection:
    """Choose what data.eval_path evaluates on, which is the `train` of what is returned.

    It is the first of validation, eval and test that is there, or else everything. `wanted` is the
    split that the path of a hub data set names.
    """
    if wanted is not None:
        return _only(path, splits, others, wanted)
    for kind in list(KEYWORDS)[1:]:
        if chosen := _of_kind(splits, kind):
            rest = [each for each in (*splits, *others) if each not in chosen]
            return SplitSelection(joined(kind, chosen), unread=tuple(rest))
    return SplitSelection(joined("", [*splits, *others]))


def _only(
    path: str, splits: Sequence[Split], others: Sequence[Split], wanted: str
) -> SplitSelection:
    found = [split for split in splits if split.name == wanted]
    if not found:
        names = [split.name for split in splits]
        has = f"it has {_names(splits)}" if splits else "its names tell none: leave data.split out"
        raise DataError(
            f"data.split: '{path}' has no split '{wanted}'{did_you_mean(wanted, names)}; {has}"
        )
    unread = [each for each in (*splits, *others) if each not in found]
    return SplitSelection(found[0], unread=tuple(unread))


def _of_kind(splits: Sequence[Split], kind: str) -> list[Split]:
    """Return the split that has the kind's own name, or else all splits of the kind."""
    found = [split for split in splits if split.kind == kind]
    return [split for split in found if split.name == kind] or found


def _names(splits: Sequence[Split]) -> str:
    return ", ".join(split.name or split.description for split in splits)
