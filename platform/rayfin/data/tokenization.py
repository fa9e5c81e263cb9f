"""Turn samples into token ids with a loss mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from rayfin.data.corpus import Corpus
from rayfin.data.learned import learned_ends, missing_end_note, unlearned_notes
from rayfin.data.profile import DataProfile, profile_of
from rayfin.data.render import RenderedConversation, begins_with_bos, render_conversations
from rayfin.data.stream import Stream
from rayfin.errors import DataError, ModelError
from rayfin.models.ends import Ends
from rayfin.objectives import SFT, Objective
from rayfin.samples import NO_LOSS, Example, TokenizedSample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The tokens that a chat template puts around a prompt; its own system message may take more.
_TEMPLATE_TOKENS = 48


@dataclass(frozen=True)
class TokenizedCorpus:
    """Both splits cut to max_length, without the samples that lost their whole answer."""

    train: list[TokenizedSample]
    eval: list[TokenizedSample]
    profile: DataProfile
    stream: Stream | None = None
    """Where training reads its samples from, if `train` is only a sample of them."""
    ends: Ends = field(default_factory=Ends)
    """The ends of answers that are learned."""


def tokenize_corpus(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    objective: Objective = SFT,
) -> TokenizedCorpus:
    """Tokenise a corpus, with loss on the assistant's turns only, or on all of a plain text.

    What the tokens are beside those of the conversations, and what has loss, says `objective`.

    The tokens before the last answer are exactly those that generation sees for the prompt alone.
    Samples are cut at the right to `max_length` tokens. Raises DataError where that leaves a split
    without labels, and ModelError for a tokenizer without character offsets.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"model.name: its tokenizer {type(tokenizer).__name__} is a slow one without character "
            "offsets; use a model that has a tokenizer.json"
        )
    tokenize = partial(tokenize_examples, tokenizer=tokenizer)
    whole = objective.encode([*corpus.train, *corpus.eval], tokenize)
    train, held_out = whole[: len(corpus.train)], whole[len(corpus.train) :]
    kept_train = _truncate_split(train, max_length, "train", objective)
    kept_eval = _truncate_split(held_out, max_length, "eval", objective)
    ends = learned_ends(corpus.train, kept_train, tokenizer)
    notes = unlearned_notes(corpus, whole, len(kept_train) + len(kept_eval), max_length)
    if ends == Ends():
        notes += (missing_end_note(corpus, train, tokenizer),)
    profile = profile_of(
        corpus,
        train=kept_train,
        held_out=kept_eval,
        truncated=sum(len(sample["input_ids"]) > max_length for sample in whole),
        notes=notes,
    )
    return TokenizedCorpus(kept_train, kept_eval, profile, corpus.stream, ends)


def needs_length_check(corpus: Corpus, max_length: int) -> bool:
    """Whether `check_lengths`, whose tokenizer takes seconds to import, could find a problem.

    A token has at least one byte, and a chat template adds a few dozen tokens.
    """
    return any(
        min(map(_prompt_bytes, split)) + _TEMPLATE_TOKENS > max_length
        for split in (corpus.train, corpus.eval)
    )


def check_lengths(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    objective: Objective = SFT,
) -> None:
    """Raise the DataError that `tokenize_corpus` would, mostly without tokenising the corpus."""
    tokenize = partial(tokenize_examples, tokenizer=tokenizer)
    for split, examples in (("train", corpus.train), ("eval", corpus.eval)):
        shortest = sorted(examples, key=_prompt_bytes)[:16]
        samples = objective.encode(shortest, tokenize)
        if all(objective.truncate(sample, max_length) is None for sample in samples):
            _truncate_split(objective.encode(examples, tokenize), max_length, split, objective)


def _prompt_bytes(example: Example) -> int:
    return sum(len(message["content"].encode()) for message in example.messages[:-1])


def tokenize_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast
) -> list[TokenizedSample]:
    """Return the samples at their full length, in order."""
    texts = [example.text for example in examples if example.text is not None]
    plain = iter(_plain_texts(texts, tokenizer))
    talks = [example for example in examples if example.text is None]
    talked = iter(_conversations(render_conversations(talks, tokenizer), tokenizer))
    return [next(talked if example.text is None else plain) for example in examples]


def _plain_texts(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[TokenizedSample]:
    bos = tokenizer.bos_token_id
    eos = tokenizer.eos_token_id
    before = [bos] if begins_with_bos(tokenizer) else []
    samples: list[TokenizedSample] = []
    for ids, _ in _encode(texts, tokenizer):
        whole = [*before, *ids] if ids[:1] != before else ids
        if eos is not None and whole[-1:] != [eos]:
            whole = [*whole, eos]
        samples.append({"input_ids": whole, "labels": list(whole)})
    return samples


def _conversations(
    rendered: list[RenderedConversation], tokenizer: PreTrainedTokenizerFast
) -> list[TokenizedSample]:
    wholes = _encode([each.text for each in rendered], tokenizer)
    prompts = [ids for ids, _ in _encode([each.prompt for each in rendered], tokenizer)]
    # Where a token straddles the border (or the answer's first letter changes how the prompt
    # splits), training on the whole text would differ from what generation is given.
    apart = [
        index
        for index, ((ids, _), prompt) in enumerate(zip(wholes, prompts, strict=True))
        if ids[: len(prompt)] != prompt
    ]
    answers = _encode([rendered[i].text[rendered[i].answer :] for i in apart], tokenizer)
    for index, (ids, starts) in zip(apart, answers, strict=True):
        prompt_starts = _encode([rendered[index].prompt], tokenizer)[0][1]
        shift = rendered[index].answer
        wholes[index] = (prompts[index] + ids, prompt_starts + [shift + at for at in starts])
    return [
        _masked(ids, starts, each, len(prompt))
        for (ids, starts), each, prompt in zip(wholes, rendered, prompts, strict=True)
    ]


def _masked(
    ids: list[int], starts: list[int], rendered: RenderedConversation, prompt_length: int
) -> TokenizedSample:
    """Return a sample whose labels are the tokens that begin in a span.

    The last span begins at token `prompt_length`.
    """
    labels = [NO_LOSS] * prompt_length
    for first, end in rendered.spans[:-1]:
        for index in range(prompt_length):
            if first <= starts[index] < end:
                labels[index] = ids[index]
    end = rendered.spans[-1][1]
    labels += [
        token if start < end else NO_LOSS
        for token, start in zip(ids[prompt_length:], starts[prompt_length:], strict=True)
    ]
    return {"input_ids": ids, "labels": labels}


def _encode(
    texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> list[tuple[list[int], list[int]]]:
    """Return (token ids, the character where each token begins) of every text."""
    if not texts:
        return []
    batch = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [
        (ids, [start for start, _ in offsets])
        for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True)
    ]


def _truncate_split(
    samples: list[TokenizedSample], max_length: int, split: str, objective: Objective
) -> list[TokenizedSample]:
    cut = (objective.truncate(sample, max_length) for sample in samples)
    kept = [sample for sample in cut if sample is not None]
    if not kept:
        shortest = min(_first_label(sample) + 1 for sample in samples)
        longest = max(len(sample["input_ids"]) for sample in samples)
        raise DataError(
            f"data.max_length: {max_length} cuts every answer off the {split} split; "
            f"give at least {shortest} to reach the first answer, {longest} to cut none"
        )
    return kept


def _first_label(sample: TokenizedSample) -> int:
    labels = sample["labels"]
    return next((i for i in range(1, len(labels)) if labels[i] != NO_LOSS), len(labels))
