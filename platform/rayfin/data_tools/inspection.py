"""What rayfin reads of a data set: its format, its lengths in tokens, and some of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rayfin.config import Config
from rayfin.data import Corpus, load_corpus
from rayfin.errors import DataError
from rayfin.objectives import objective_of
from rayfin.samples import NO_LOSS, TokenizedSample
from rayfin.training.spec import TrialSpec
from rayfin.training.trial_cache import TrialCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PERCENTILES = (5, 25, 50, 75, 95, 99)
_TOKENIZED = 5000
"""The samples that are tokenised at most: the first ones, as their order is random."""
_UNCUT = 2**31
_BAD_ROWS_SHOWN = 5


@dataclass(frozen=True)
class Lengths:
    """The lengths of samples in tokens."""

    mean: float
    percentiles: dict[str, int]
    """By `p5` to `p99`, by the nearest rank, so that each is the length of some sample."""
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        """Summarise lengths, of which there must be at least one."""
        ordered = sorted(lengths)
        ranks = {n: max(0, -(-n * len(ordered) // 100) - 1) for n in PERCENTILES}
        found = {f"p{n}": ordered[rank] for n, rank in ranks.items()}
        return cls(sum(ordered) / len(ordered), found, ordered[-1])


@dataclass(frozen=True)
class SamplePart:
    """Neighbouring tokens of a sample, as text."""

    text: str
    learned: bool
    """Whether they have a loss."""


@dataclass(frozen=True)
class Inspection:
    """What is read of a data set."""

    shape: str
    """The format of the rows, as `data.format` names it."""
    rows_train: int
    rows_eval: int
    eval_split: str
    """The name of the evaluation split, or `held_out` for rows held out of training."""
    bad_rows: int
    first_bad_rows: tuple[str, ...]
    """The first of them: FILE:LINE: the reason."""
    notes: tuple[str, ...]
    tokenized: int
    """The samples that `lengths` and `learned` are of."""
    lengths: Lengths
    learned: Lengths
    """The numbers of tokens with a loss."""
    samples: tuple[tuple[SamplePart, ...], ...]
    """Some training samples as they are trained on, in their parts."""

    def as_dict(self) -> dict[str, Any]:
        """Return the findings as JSON stores them."""
        return asdict(self)


def inspect_data(config: Config, samples: int = 3) -> Inspection:
    """Read the data of a configuration and tokenise some of it, as training would.

    Rows that can't be used are counted, whatever data.on_bad_row says. Raises DataError where there
    is nothing to train on, and what loading the tokenizer raises.
    """
    spec = TrialSpec.of(config)
    data = config.data.model_copy(update={"on_bad_row": "skip"})  # with paths as they are written
    objective = objective_of(config.train)
    corpus = load_corpus(data, objective)
    some = _first(corpus)
    uncut = data.model_copy(update={"max_length": _UNCUT})
    cache = TrialCache({data: some, uncut: some})
    whole = cache.tokenized(spec.model_copy(update={"data": uncut}))
    every = [*whole.train, *whole.eval]
    try:
        cut = cache.tokenized(spec.model_copy(update={"data": data}))
    except DataError as error:  # too short a max_length: that is what is to be said
        shown, notes = [], (*some.notes, str(error))
    else:
        shown, notes = cut.train, cut.profile.notes
    tokenizer = cache.tokenizer(spec)
    return Inspection(
        shape=corpus.shape,
        rows_train=len(corpus.train) if corpus.stream is None else sum(corpus.stream.rows),
        rows_eval=len(corpus.eval),
        eval_split=corpus.eval_split,
        bad_rows=corpus.skipped_rows,
        first_bad_rows=tuple(str(bad) for bad in corpus.skipped[:_BAD_ROWS_SHOWN]),
        notes=notes,
        tokenized=len(every),
        lengths=Lengths.of([len(each["input_ids"]) for each in every]),
        learned=Lengths.of([_learned(each) for each in every]),
        samples=tuple(_parts(each, tokenizer) for each in shown[:samples]),
    )


def _first(corpus: Corpus) -> Corpus:
    """Return a corpus of the first samples."""
    held_out = min(len(corpus.eval), _TOKENIZED // 5)
    return replace(corpus, train=corpus.train[: _TOKENIZED - held_out], eval=corpus.eval[:held_out])


def _learned(sample: TokenizedSample) -> int:
    return len(sample["labels"]) - sample["labels"].count(NO_LOSS)


def _parts(sample: TokenizedSample, tokenizer: PreTrainedTokenizerFast) -> tuple[SamplePart, ...]:
    """Return a sample as text in which learned and other tokens alternate."""
    pairs = zip(sample["input_ids"], sample["labels"], strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1] != NO_LOSS)
    return tuple(
        SamplePart(str(tokenizer.decode([token for token, _ in run])), learned)
        for learned, run in runs
    )
