"""Describe a data set by numbers by which trials on different data can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rayfin.data.corpus import Corpus
from rayfin.data.mixture import SourceUse
from rayfin.samples import NO_LOSS, Example, TokenizedSample


@dataclass(frozen=True)
class DataProfile:
    """Statistics of a tokenised corpus; token figures cover both splits, after the cut.

    For streamed data only the rows are counted; all other figures are those of a sample.
    """

    rows_train: int
    rows_eval: int
    skipped_rows: int
    """The number of bad rows that were left out."""
    shape: str
    """The format of the rows, as `data.format` names it; of several, each once, with commas."""
    tokens_per_sample_mean: float
    tokens_per_sample_p50: int
    tokens_per_sample_p95: int
    tokens_per_sample_max: int
    completion_share: float
    """The share of tokens with loss."""
    truncated: int
    """The number of samples that were cut to max_length."""
    dropped: int
    """The number of samples that lost their whole answer; no split counts them as rows."""
    vocabulary_size: int
    """The number of distinct tokens."""
    vocabulary_overlap: float
    """The share of the eval split's distinct tokens that occur in the train split."""
    type_token_ratio: float
    """Distinct tokens divided by tokens."""
    duplicate_share: float
    """The share of samples that repeat an earlier one."""
    mean_turns: float
    """The mean number of user and assistant turns in a sample; a plain text counts as one."""
    digest: str
    """A hash of the corpus' content and split; neither tokenizer nor max_length enter it."""
    source: str
    """A hash that is the same for every subset and split of the data."""
    eval_digest: str
    """A hash of the evaluation split's tokens after the cut, and of which of them have a loss."""
    eval_answers: str | None
    """A hash of the evaluation samples' content, where each has one answer and none was cut.

    Trials that share it have the same answers to give, in whatever tokens. None elsewhere.
    """
    eval_split: str
    """The name of the evaluation split, or `held_out` for rows held out of training."""
    eval_rows_in_train: int
    """The number of evaluation samples that also occur in the training data."""
    sources: tuple[SourceUse, ...]
    """What is taken of each of data.sources; empty for data.path."""
    notes: tuple[str, ...]
    """What the user should know about how the data was read, one line each."""

    def as_dict(self) -> dict[str, Any]:
        """Return the profile as JSON stores it."""
        lists = {"sources": [asdict(each) for each in self.sources], "notes": list(self.notes)}
        return asdict(self) | lists  # as JSON gives it back


def profile_of(
    corpus: Corpus,
    *,
    train: Sequence[TokenizedSample],
    held_out: Sequence[TokenizedSample],
    truncated: int,
    eval_is_whole: bool,
    notes: Sequence[str],
) -> DataProfile:
    """Return the profile of a corpus that was tokenised and cut to `train` and `held_out`.

    `truncated` samples were cut, and none of `held_out` where `eval_is_whole`; `notes` are the
    notes on the tokenisation.
    """
    examples = [*corpus.train, *corpus.eval]
    lengths = sorted(len(sample["input_ids"]) for sample in [*train, *held_out])
    tokens = sum(lengths)
    learned = sum(
        len(sample["labels"]) - sample["labels"].count(NO_LOSS) for sample in [*train, *held_out]
    )
    seen = set().union(*(sample["input_ids"] for sample in train))
    asked = set().union(*(sample["input_ids"] for sample in held_out))
    turns = [
        sum(message["role"] != "system" for message in example.messages) or 1
        for example in examples
    ]
    distinct = len({example.canonical() for example in examples})
    return DataProfile(
        rows_train=len(train) if corpus.stream is None else sum(corpus.stream.rows),
        rows_eval=len(held_out),
        skipped_rows=corpus.skipped_rows,
        shape=corpus.shape,
        tokens_per_sample_mean=tokens / len(lengths),
        tokens_per_sample_p50=_percentile(lengths, 0.50),
        tokens_per_sample_p95=_percentile(lengths, 0.95),
        tokens_per_sample_max=lengths[-1],
        completion_share=learned / tokens,
        truncated=truncated,
        dropped=len(examples) - len(lengths),
        vocabulary_size=len(seen | asked),
        vocabulary_overlap=len(asked & seen) / len(asked),
        type_token_ratio=len(seen | asked) / tokens,
        duplicate_share=1 - distinct / len(examples),
        mean_turns=sum(turns) / len(turns),
        digest=corpus.digest,
        source=corpus.source,
        eval_digest=_digest(held_out),
        eval_answers=_answers(corpus.eval) if eval_is_whole else None,
        eval_split=corpus.eval_split,
        eval_rows_in_train=corpus.eval_rows_in_train,
        sources=corpus.sources,
        notes=(*corpus.notes, *notes),
    )


def _digest(samples: Sequence[TokenizedSample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sorted(dict[str, Any](sample).items())}\n".encode())
    return digest.hexdigest()[:32]


def _answers(examples: Sequence[Example]) -> str | None:
    """Return a hash of conversations that have one answer each; None where any has not."""
    digest = hashlib.sha256()
    for example in examples:
        if [turn["role"] for turn in example.messages].count("assistant") != 1:
            return None
        digest.update(f"{example.canonical()}\n".encode())
    return digest.hexdigest()[:32]


def _percentile(ordered: Sequence[int], share: float) -> int:
    """Return a percentile by the nearest-rank method, so that it is the length of some sample."""
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]
