"""What tokenising takes away from the data, as lines to be told."""

from __future__ import annotations

from collections.abc import Sequence

from rayfin.data.examples import NO_LOSS, Corpus, TokenizedSample
from rayfin.data.render import learned_turns


def losses(
    corpus: Corpus, whole: Sequence[TokenizedSample], kept: int, max_length: int
) -> tuple[str, ...]:
    """Returns a line for each way in which something is lost; none where nothing is.

    `whole`: the samples of both splits before they were cut to `max_length`; `kept`: how many had
    anything left to learn then.
    """
    count = len(whole)
    samples = f"{count} samples" if corpus.stream is None else f"a sample of {count}"
    told = []
    examples = [*corpus.train, *corpus.eval]
    pairs = zip(examples, whole, strict=True)
    alone = sum(
        len(learned_turns(example)) > 1 and _is_one_run(sample["labels"])
        for example, sample in pairs
        if example.text is None
    )
    if alone:
        told.append(
            f"data: of {alone} of {samples} only the last answer is learned, as the model's chat "
            "template writes earlier ones otherwise"
        )
    lengths = [len(sample["input_ids"]) for sample in whole]
    if max(lengths) > max_length:
        cut, dropped = sum(length > max_length for length in lengths), count - kept
        lost = f", and {dropped} left out, as nothing of an answer remains" if dropped else ""
        told.append(
            f"data: {cut} of {samples} cut at data.max_length={max_length}{lost}; "
            f"data.max_length={max(lengths)} cuts none"
        )
    return tuple(told)


def _is_one_run(labels: Sequence[int]) -> bool:
    """Whether all that is learned is one piece; turns have a question between them."""
    learned = [index for index, label in enumerate(labels) if label != NO_LOSS]
    return bool(learned) and learned[-1] - learned[0] + 1 == len(learned)
