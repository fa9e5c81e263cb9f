"""Leave out conversations that the chat template refuses, as `data.on_bad_row` says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rayfin.data.corpus import Corpus
from rayfin.data.fitting import Encode
from rayfin.data.render import RefusedConversation
from rayfin.data.splits import count_rows
from rayfin.data.token_settings import TokenSettings
from rayfin.errors import DataError
from rayfin.samples import Example, TokenizedSample


def encode_accepted(
    examples: Sequence[Example], encode: Encode, settings: TokenSettings
) -> list[TokenizedSample | None]:
    """Return the samples of examples, with None for those that the chat template refuses.

    Raises RefusedConversation for the first of them unless `settings.on_bad_row` is skip.
    """
    try:
        return list(encode(examples))
    except RefusedConversation as error:
        if settings.on_bad_row == "error":
            raise RefusedConversation(
                f"{error}, or leave such conversations out with data.on_bad_row=skip"
            ) from error
    found: list[TokenizedSample | None] = []
    for example in examples:
        try:
            found += encode([example])
        except RefusedConversation:
            found.append(None)
    return found


def accepted_pairs(
    examples: Sequence[Example], encode: Encode, settings: TokenSettings
) -> tuple[list[Example], list[TokenizedSample]]:
    """Return the examples that `encode_accepted` does not leave out, and their samples."""
    encoded = encode_accepted(examples, encode, settings)
    pairs = zip(examples, encoded, strict=True)
    return (
        [example for example, sample in pairs if sample is not None],
        [sample for sample in encoded if sample is not None],
    )


def left_out_note(refused: int, given: int, *, sampled: bool = False) -> tuple[str, ...]:
    """Return a line on the conversations that the chat template refuses, if there are any.

    `sampled`: the `given` ones are a sample of streamed data.
    """
    if not refused:
        return ()
    of = f"{given} {'sampled ' if sampled else ''}conversations"
    return (
        f"data: {refused} of {of} left out (data.on_bad_row=skip), as the chat template refuses "
        "them",
    )


def streamed_note(refused: int, read: int, steps: int) -> tuple[str, ...]:
    """Return a line on the samples that a trial on streamed data left out, if there are any.

    `read` are the samples of its `steps`. Raises DataError where the chat template refuses all.
    """
    made = f"{steps} step{'' if steps == 1 else 's'}"
    if refused and refused == read:
        raise _all_refused(f"all {count_rows(read)} that {made} read of the streamed data")
    return tuple(f"{note}, in {made}" for note in left_out_note(refused, read))


def _all_refused(what: str, reason: str = "") -> DataError:
    return DataError(
        f"data: the chat template refuses {what}{reason}; use another model or data.chat_template"
    )


def _first_reason(examples: Sequence[Example], encode: Encode) -> str:
    """Return what the template says of the first example, in brackets."""
    try:
        encode(examples[:1])
    except RefusedConversation as error:
        return f" (of the first: {error.why})" if error.why else ""
    return ""


def accepted_corpus(
    corpus: Corpus, encode: Encode, settings: TokenSettings
) -> tuple[Corpus, list[TokenizedSample], list[TokenizedSample]]:
    """Return a corpus without the conversations that are left out, and each split's samples."""
    train, train_samples = accepted_pairs(corpus.train, encode, settings)
    held_out, eval_samples = accepted_pairs(corpus.eval, encode, settings)
    if not train or not held_out:
        refused = f"all of the {'eval' if train else 'train'} split"
        if not train and corpus.stream is not None:
            refused = f"all of a sample of {count_rows(len(corpus.train))} of the streamed data"
        raise _all_refused(refused, _first_reason(corpus.eval if train else corpus.train, encode))
    return replace(corpus, train=tuple(train), eval=tuple(held_out)), train_samples, eval_samples
