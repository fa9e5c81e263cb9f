"""Which parts of a tokenised corpus are learned, and notes on those that are not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rayfin.data.corpus import Corpus
from rayfin.data.render import learned_turns, turn_end
from rayfin.models.ends import Ends
from rayfin.samples import NO_LOSS, Example, TokenizedSample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def learned_ends(
    examples: Iterable[Example],
    samples: Sequence[TokenizedSample],
    tokenizer: PreTrainedTokenizerFast,
) -> Ends:
    """Return the ends of answers that are learned from `samples`, the tokens of `examples`.

    A conversation's answers end with what `turn_end` returns, a plain text with the end-of-sequence
    token. An end that is no label of any sample is left out: every answer was cut before it.
    """
    kinds = {example.text is None for example in examples}
    found = turn_end(tokenizer) if True in kinds else Ends()
    if False in kinds and isinstance(tokenizer.eos_token_id, int):
        found |= Ends((tokenizer.eos_token_id,))
    learned = {
        token for token in found.token_ids if any(token in each["labels"] for each in samples)
    }
    return Ends(tuple(token for token in found.token_ids if token in learned), found.texts)


def missing_end_note(
    corpus: Corpus, samples: Sequence[TokenizedSample], tokenizer: PreTrainedTokenizerFast
) -> str:
    """Return a line that says why no sample teaches where an answer ends.

    `samples` are the training samples before they were cut.
    """
    if learned_ends(corpus.train, samples, tokenizer) != Ends():
        why = "every answer is cut before its end; raise data.max_length"
    elif any(example.text is None for example in corpus.train) and tokenizer.chat_template:
        why = (
            "the model's chat template writes none, and its tokenizer has no eos_token; "
            "use a model that has either"
        )
    else:
        why = "the model's tokenizer has no eos_token; name one in its tokenizer_config.json"
    return f"data: no end of an answer is learned, and answers go on to max_tokens: {why}"


def unlearned_notes(
    corpus: Corpus, samples: Sequence[TokenizedSample], kept: int, max_length: int
) -> tuple[str, ...]:
    """Return a line for each reason why something of the data is not learned.

    `samples` are those of both splits before they were cut to `max_length`; `kept` of them still
    had labels afterwards.
    """
    count = len(samples)
    shown = f"{count} samples" if corpus.stream is None else f"a sample of {count}"
    notes = []
    pairs = zip([*corpus.train, *corpus.eval], samples, strict=True)
    last_only = sum(
        len(learned_turns(example)) > 1 and _is_one_span(sample["labels"])
        for example, sample in pairs
        if example.text is None
    )
    if last_only:
        notes.append(
            f"data: of {last_only} of {shown} only the last answer is learned, as the model's chat "
            "template writes earlier ones otherwise"
        )
    lengths = [len(sample["input_ids"]) for sample in samples]
    if max(lengths) > max_length:
        cut, dropped = sum(length > max_length for length in lengths), count - kept
        lost = f", and {dropped} left out, as nothing of an answer remains" if dropped else ""
        notes.append(
            f"data: {cut} of {shown} cut at data.max_length={max_length}{lost}; "
            f"data.max_length={max(lengths)} cuts none"
        )
    return tuple(notes)


def _is_one_span(labels: Sequence[int]) -> bool:
    """Whether the labels are one contiguous span; between two answers there is a question."""
    learned = [index for index, label in enumerate(labels) if label != NO_LOSS]
    return bool(learned) and learned[-1] - learned[0] + 1 == len(learned)
