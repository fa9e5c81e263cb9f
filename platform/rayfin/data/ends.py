"""Which ends of an answer training teaches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rayfin.data.examples import Corpus, Example, TokenizedSample
from rayfin.data.render import turn_end
from rayfin.models.ends import Ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def taught_ends(
    examples: Iterable[Example],
    samples: Sequence[TokenizedSample],
    tokenizer: PreTrainedTokenizerFast,
) -> Ends:
    """The ends of answers that are learned from `samples`, which are `examples` in tokens.

    An end is what `turn_end` gives, and of plain text the end-of-sequence token. One that no label
    names is not taught: every answer was cut before it.
    """
    kinds = {example.text is None for example in examples}
    found = turn_end(tokenizer) if True in kinds else Ends()
    if False in kinds and isinstance(tokenizer.eos_token_id, int):
        found |= Ends((tokenizer.eos_token_id,))
    learned = {
        token for token in found.token_ids if any(token in each["labels"] for each in samples)
    }
    return Ends(tuple(token for token in found.token_ids if token in learned), found.texts)


def no_end(
    corpus: Corpus, whole: Sequence[TokenizedSample], tokenizer: PreTrainedTokenizerFast
) -> str:
    """A line that says why nothing teaches where an answer ends.

    `whole`: the training samples before they were cut.
    """
    if taught_ends(corpus.train, whole, tokenizer) != Ends():
        why = "every answer is cut before its end; raise data.max_length"
    elif any(example.text is None for example in corpus.train) and tokenizer.chat_template:
        why = (
            "the model's chat template writes none, and its tokenizer has no eos_token; "
            "use a model that has either"
        )
    else:
        why = "the model's tokenizer has no eos_token; name one in its tokenizer_config.json"
    return f"data: no end of an answer is learned, and answers go on to max_tokens: {why}"
