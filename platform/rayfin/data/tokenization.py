"""Turn samples into token ids with a loss mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from rayfin.data.accepted import accepted_corpus, accepted_pairs, left_out_note
from rayfin.data.corpus import Corpus
from rayfin.data.fitting import Encode, fit_samples
from rayfin.data.learned import learned_ends, missing_end_note, unlearned_notes
from rayfin.data.profile import DataProfile, profile_of
from rayfin.data.render import RenderedConversation, render_conversations, render_example
from rayfin.data.stream import Stream
from rayfin.data.template_notes import template_notes
from rayfin.data.token_settings import DEFAULTS, TokenSettings
from rayfin.data.tools import check_turns
from rayfin.errors import DataError, ModelError
from rayfin.models.chat_templates import begins_with_bos
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
    settings: TokenSettings = DEFAULTS,
) -> TokenizedCorpus:
    """Tokenise a corpus, with loss on the assistant's turns only, or on all of a plain text.

    What the tokens are beside those of the conversations, and what has loss, says `objective`.

    The tokens before the last answer are exactly those that generation sees for the prompt alone.
    Samples of more than `max_length` tokens are cut, or left out, as `settings.truncation` says.
    Raises DataError where that leaves a split without labels, and ModelError for a tokenizer
    without character offsets.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"model.name: its tokenizer {type(tokenizer).__name__} is a slow one without character "
            "offsets; use a model that has a tokenizer.json"
        )
    encode = partial(encode_examples, tokenizer=tokenizer, objective=objective, settings=settings)
    given = len(corpus.train) + len(corpus.eval)
    talks = [each for each in (*corpus.train, *corpus.eval) if each.text is None]
    check_turns(talks, partial(render_example, tokenizer=tokenizer))
    corpus, train, held_out = accepted_corpus(corpus, encode, settings)
    whole = [*train, *held_out]
    fit = partial(
        _fit_split, encode=encode, max_length=max_length, objective=objective, settings=settings
    )
    kept_train = fit(corpus.train, train, split="train")
    kept_eval = fit(corpus.eval, held_out, split="eval")
    ends = learned_ends(corpus.train, kept_train, tokenizer)
    kept = len(kept_train) + len(kept_eval)
    notes = (
        *unlearned_notes(corpus, whole, kept, max_length, settings),
        *template_notes(corpus, tokenizer, settings),
        *left_out_note(given - len(whole), given, sampled=corpus.stream is not None),
    )
    if ends == Ends():
        notes += (missing_end_note(corpus, train, tokenizer),)
    cut = sum(len(sample["input_ids"]) > max_length for sample in whole)
    profile = profile_of(
        corpus,
        train=kept_train,
        held_out=kept_eval,
        truncated=0 if settings.truncation == "drop" else cut,
        eval_is_whole=not any(len(sample["input_ids"]) > max_length for sample in held_out),
        notes=notes,
    )
    return TokenizedCorpus(kept_train, kept_eval, profile, corpus.stream, ends)


def needs_length_check(corpus: Corpus, max_length: int, settings: TokenSettings = DEFAULTS) -> bool:
    """Whether `check_lengths`, whose tokenizer takes seconds to import, could find a problem.

    A token has at least one byte, and a chat template adds a few dozen tokens, or many where it
    explains tools.
    """
    room = max_length - _TEMPLATE_TOKENS - len((settings.system or "").encode())
    size = _bytes if settings.truncation == "drop" else _prompt_bytes
    return any(
        min(map(size, split)) > room or any(example.uses_tools for example in split)
        for split in (corpus.train, corpus.eval)
    )


def check_lengths(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    objective: Objective = SFT,
    settings: TokenSettings = DEFAULTS,
) -> None:
    """Raise the DataError that `tokenize_corpus` would, mostly without tokenising the corpus."""
    encode = partial(encode_examples, tokenizer=tokenizer, objective=objective, settings=settings)
    fit = partial(
        fit_samples, encode=encode, max_length=max_length, objective=objective, settings=settings
    )
    for split, examples in (("train", corpus.train), ("eval", corpus.eval)):
        some = sorted(examples, key=_bytes if settings.truncation == "drop" else _prompt_bytes)[:16]
        some += [example for example in examples if example.uses_tools][:16]
        if not any(fit(*accepted_pairs(some, encode, settings))):
            _fit_split(
                *accepted_pairs(examples, encode, settings),
                encode=encode,
                max_length=max_length,
                objective=objective,
                settings=settings,
                split=split,
            )


def _prompt_bytes(example: Example) -> int:
    return sum(len(message["content"].encode()) for message in example.messages[:-1])


def _bytes(example: Example) -> int:
    last = example.messages[-1]["content"] if example.messages else example.text or ""
    return _prompt_bytes(example) + len(last.encode())


def encode_examples(
    examples: Sequence[Example],
    *,
    tokenizer: PreTrainedTokenizerFast,
    objective: Objective,
    settings: TokenSettings = DEFAULTS,
) -> list[TokenizedSample]:
    """Return the samples of an objective at their full length, in order."""
    last_only = settings.train_on == "last"
    tokenize = partial(tokenize_examples, tokenizer=tokenizer, last_only=last_only)
    return objective.encode([settings.with_system(each) for each in examples], tokenize)


def tokenize_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, *, last_only: bool = False
) -> list[TokenizedSample]:
    """Return the samples at their full length, in order; `last_only`: with loss on last answers."""
    texts = [example.text for example in examples if example.text is not None]
    plain = iter(_plain_texts(texts, tokenizer))
    talks = [example for example in examples if example.text is None]
    rendered = render_conversations(talks, tokenizer, last_only=last_only)
    talked = iter(_conversations(rendered, tokenizer))
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
        if not _begins(ids, prompt)
    ]
    answers = _encode([rendered[i].text[rendered[i].answer :] for i in apart], tokenizer)
    for index, (ids, starts) in zip(apart, answers, strict=True):
        prompt_starts = _encode([rendered[index].prompt], tokenizer)[0][1]
        shift = rendered[index].answer
        wholes[index] = (prompts[index] + ids, prompt_starts + [shift + at for at in starts])
    exact = _exact_spans(wholes, rendered, tokenizer)
    return [
        _masked(ids, starts, spans, len(prompt))
        for (ids, starts), spans, prompt in zip(wholes, exact, prompts, strict=True)
    ]


def _exact_spans(
    wholes: list[tuple[list[int], list[int]]],
    rendered: list[RenderedConversation],
    tokenizer: PreTrainedTokenizerFast,
) -> list[list[tuple[int, int]]]:
    """Return the spans before which the tokens are those that generation would be given.

    Of an earlier answer they are others where a token straddles its beginning; the last answer's
    are always the same (`_conversations`).
    """
    earlier = [(each.text[:start]) for each in rendered for start, _ in each.spans[:-1]]
    prompts = iter(_encode(earlier, tokenizer))
    found = []
    for (ids, _), each in zip(wholes, rendered, strict=True):
        same = [span for span in each.spans[:-1] if _begins(ids, next(prompts)[0])]
        found.append([*same, each.spans[-1]])
    return found


def _begins(ids: list[int], prompt: list[int]) -> bool:
    return ids[: len(prompt)] == prompt


def _masked(
    ids: list[int], starts: list[int], spans: Sequence[tuple[int, int]], prompt_length: int
) -> TokenizedSample:
    """Return a sample whose labels are the tokens that begin in a span.

    The last span begins at token `prompt_length`.
    """
    labels = [NO_LOSS] * prompt_length
    for first, end in spans[:-1]:
        for index in range(prompt_length):
            if first <= starts[index] < end:
                labels[index] = ids[index]
    end = spans[-1][1]
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


def _fit_split(
    examples: Sequence[Example],
    samples: Sequence[TokenizedSample],
    *,
    encode: Encode,
    max_length: int,
    objective: Objective,
    settings: TokenSettings,
    split: str,
) -> list[TokenizedSample]:
    """Return the samples of a split that are left; raises DataError where there are none."""
    fit = fit_samples(
        examples,
        samples,
        encode=encode,
        max_length=max_length,
        objective=objective,
        settings=settings,
    )
    kept = [sample for sample in fit if sample is not None]
    if not kept:
        lengths = [len(sample["input_ids"]) for sample in samples]
        if settings.truncation == "drop":
            raise DataError(
                f"data.max_length: data.truncation=drop leaves out all of the {split} split at "
                f"{max_length}; give at least {min(lengths)} to keep a sample, {max(lengths)} to "
                "keep all"
            )
        shortest = min(_first_label(sample) + 1 for sample in samples)
        raise DataError(
            f"data.max_length: {max_length} cuts every answer off the {split} split; "
            f"give at least {shortest} to reach the first answer, {max(lengths)} to cut none"
        )
    return kept


def _first_label(sample: TokenizedSample) -> int:
    labels = sample["labels"]
    return next((i for i in range(1, len(labels)) if labels[i] != NO_LOSS), len(labels))
