"""What a data set is like, in numbers that trials on different data can be compared by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rayfin.data.examples import NO_LOSS, Corpus, TokenizedSample


@dataclass(frozen=True)
class DataProfile:
    """Facts about a tokenised corpus; token figures are of both splits, after the cut.

    Of a streamed one only the rows are counted; all else is of a sample.
    """

    rows_train: int
    rows_eval: int
    skipped_rows: int
    """Bad rows that were left out."""
    shape: str
    """The format that the rows had."""
    tokens_per_sample_mean: float
    tokens_per_sample_p50: int
    tokens_per_sample_p95: int
    tokens_per_sample_max: int
    completion_share: float
    """Tokens with loss / tokens."""
    truncated: int
    """Samples that were cut to max_length."""
    dropped: int
    """Samples whose answer was cut off entirely; they are in neither split's rows."""
    vocabulary_size: int
    """Distinct tokens."""
    vocabulary_overlap: float
    """Share of the eval split's distinct tokens that occur in train."""
    type_token_ratio: float
    """Distinct tokens / tokens."""
    duplicate_share: float
    """Share of the samples whose content came before."""
    mean_turns: float
    """User and assistant turns per sample; a plain text is one."""
    digest: str
    """Of the corpus' content and split; neither tokenizer nor max_length enter it."""
    source: str
    """The same for any subset and split of the data."""
    eval_split: str
    """The name of the split that was evaluated on; held_out: rows held out of training."""
    eval_rows_in_train: int
    """Samples evaluated on that are in the training data, too."""
    notes: tuple[str, ...]
    """What whoever brought the data should know of how it was read, a line each."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"notes": list(self.notes)}  # as JSON gives it back


def profile_of(
    corpus: Corpus,
    *,
    train: Sequence[TokenizedSample],
    held_out: Sequence[TokenizedSample],
    truncated: int,
    notes: Sequence[str],
) -> DataProfile:
    """The profile of `corpus`, tokenised and cut to `train` and `held_out`.

    `truncated` samples were cut. `notes`: what is to be told of the tokenising.
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
        eval_split=corpus.eval_split,
        eval_rows_in_train=corpus.eval_rows_in_train,
        notes=(*corpus.notes, *notes),
    )


def _percentile(ordered: Sequence[int], share: float) -> int:
    """Nearest rank: a length that a sample really has."""
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]
