"""Which parts of a tokenised corpus are learned, and notes on those that are not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rayfin.data.corpus import Corpus
from rayfin.data.render import learned_turns, probed, turn_end
from rayfin.data.token_settings import DEFAULTS, TokenSettings
from rayfin.models.ends import PROBES, Ends, shows_answer
from rayfin.samples import NO_LOSS, Example, TokenizedSample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MANY = 0.05
"""The share of cut samples above which their note says how many that is."""


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
            "the chat template writes none, and the tokenizer has no eos_token; use a model that "
            "has either, or another data.chat_template"
        )
        if not shows_answer(probed(PROBES[0], tokenizer)):
            why = (
                "the chat template writes answers otherwise than they are, so that what follows "
                "one can't be told; use another data.chat_template"
            )
    else:
        why = "the model's tokenizer has no eos_token; name one in its tokenizer_config.json"
    return f"data: no end of an answer is learned, and answers go on to max_tokens: {why}"


def unlearned_notes(
    corpus: Corpus,
    samples: Sequence[TokenizedSample],
    kept: int,
    max_length: int,
    settings: TokenSettings = DEFAULTS,
) -> tuple[str, ...]:
    """Return a line for each reason why something of the data is not learned.

    `samples` are those of both splits before they were cut to `max_length`; `kept` of them still
    had labels afterwards.
    """
    count = len(samples)
    shown = f"{count} samples" if corpus.stream is None else f"a sample of {count}"
    notes: list[str] = []
    examples = [*corpus.train, *corpus.eval]
    if greetings := sum(map(_begins_with_answer, examples)):
        notes.append(
            f"data: {greetings} of {shown} begin with an answer before the first question, which "
            "is read and not learned; a question before it makes it learned"
        )
    if settings.train_on == "all":
        notes += _rewritten_notes(corpus, samples, shown)
    lengths = [len(sample["input_ids"]) for sample in samples]
    if max(lengths) > max_length:
        cut, dropped = sum(length > max_length for length in lengths), count - kept
        many = "" if cut <= _MANY * count else f" ({cut / count:.0%}, more than {_MANY:.0%})"
        if settings.truncation == "drop":
            notes.append(
                f"data: {cut} of {shown}{many} left out (data.truncation=drop), as they have more "
                f"tokens than data.max_length={max_length}; data.max_length={max(lengths)} keeps "
                "all"
            )
            return tuple(notes)
        side = " at their beginning" if settings.truncation == "left" else ""
        lost = f", and {dropped} left out, as nothing of an answer remains" if dropped else ""
        notes.append(
            f"data: {cut} of {shown}{many} cut{side} at data.max_length={max_length}{lost}; "
            f"data.max_length={max(lengths)} cuts none"
        )
    return tuple(notes)


def _begins_with_answer(example: Example) -> bool:
    first = next((turn["role"] for turn in example.messages if turn["role"] != "system"), "")
    return first == "assistant"


def _rewritten_notes(
    corpus: Corpus, samples: Sequence[TokenizedSample], shown: str
) -> Iterator[str]:
    """Yield how many samples have answers that the chat template writes otherwise later on."""
    last_only = some = 0
    pairs = zip([*corpus.train, *corpus.eval], samples, strict=True)
    for example, sample in pairs:
        if example.text is None and (turns := len(learned_turns(example))) > 1:
            spans = _count_spans(sample["labels"])
            last_only += spans == 1
            some += 1 < spans < turns
    if last_only:
        yield (
            f"data: of {last_only} of {shown} only the last answer is learned, as the model's chat "
            "template writes earlier ones otherwise"
        )
    if some:
        yield (
            f"data: of {some} of {shown} some earlier answers are not learned, as the model's chat "
            "template writes them otherwise once others follow"
        )


def _count_spans(labels: Sequence[int]) -> int:
    """Return the number of spans with loss; between two answers there is a question."""
    pairs = zip([NO_LOSS, *labels], labels, strict=False)
    return sum(before == NO_LOSS != label for before, label in pairs)
