"""Make samples fit `data.max_length`, as `data.truncation` says."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace

from rayfin.data.token_settings import TokenSettings, has_system
from rayfin.objectives import Objective
from rayfin.samples import Example, TokenizedSample

Encode = Callable[[Sequence[Example]], list[TokenizedSample]]
"""Returns the samples of examples at their full length."""

_Shortening = Generator[Example, TokenizedSample, TokenizedSample]

_ROUNDS = 10
"""Bisections of a text: what is cut from it is too much by less than a thousandth."""


def fit_samples(
    examples: Sequence[Example],
    samples: Sequence[TokenizedSample],
    *,
    encode: Encode,
    max_length: int,
    objective: Objective,
    settings: TokenSettings,
) -> list[TokenizedSample | None]:
    """Return the samples with at most `max_length` tokens; None where nothing to learn is left.

    `samples` are what `encode` makes of `examples`. With `left`, the earliest questions and answers
    of a longer conversation go first, then the beginning of its only question, or of a plain text;
    the system message, the tools and the last answer stay. What is too long even then is cut at the
    right, as all is with `right`. With `drop`, whatever is longer is left out.
    """
    found: list[TokenizedSample | None] = list(samples)
    long = [i for i, sample in enumerate(samples) if len(sample["input_ids"]) > max_length]
    if settings.truncation == "drop":
        for index in long:
            found[index] = None
    elif settings.truncation == "left":
        found = list(_shortened(examples, samples, long, encode, max_length))
    return [None if each is None else objective.truncate(each, max_length) for each in found]


def _shortened(
    examples: Sequence[Example],
    samples: Sequence[TokenizedSample],
    long: Sequence[int],
    encode: Encode,
    max_length: int,
) -> Sequence[TokenizedSample]:
    """Return the samples, the `long` ones without their beginnings."""
    found = list(samples)
    attempts = {i: _cut_left(examples[i], samples[i], max_length) for i in long}
    answers: dict[int, TokenizedSample | None] = dict.fromkeys(attempts)
    while answers:  # one attempt of each, as one batch
        proposed: dict[int, Example] = {}
        for index, answer in answers.items():
            try:
                attempt = attempts[index]
                proposed[index] = next(attempt) if answer is None else attempt.send(answer)
            except StopIteration as end:
                found[index] = end.value
        answers = dict(zip(proposed, encode([*proposed.values()]), strict=True)) if proposed else {}
    return found


def _cut_left(example: Example, sample: TokenizedSample, max_length: int) -> _Shortening:
    """Yield shorter examples, take what each is in tokens, and return the longest that fits.

    So the sample is what the chat template writes of the shorter conversation. Where nothing fits,
    it is that of the last question and answer.
    """
    last = example
    for last in _later(example):
        sample = yield last
        if len(sample["input_ids"]) <= max_length:
            return sample
    text, fitting = _beginning(last), None
    least, most = 0, len(text)  # characters to cut: too few, and all
    for _ in range(_ROUNDS):
        cut = (least + most) // 2
        if cut <= least or not text[cut:].strip():
            break
        short = yield _with_beginning(last, text[cut:])
        if len(short["input_ids"]) <= max_length:
            fitting, most = short, cut
        else:
            least = cut
    return sample if fitting is None else fitting


def _later(example: Example) -> Iterator[Example]:
    """Yield a conversation from each later question on, after its system message."""
    head = 1 if has_system(example.messages) else 0
    for start, turn in enumerate(example.messages):
        if turn["role"] == "user" and start > head:
            moved = start - head
            yield replace(
                example,
                messages=(*example.messages[:head], *example.messages[start:]),
                unlearned=tuple(it - moved for it in example.unlearned if it > start),
                rejected=(*example.rejected[:head], *example.rejected[start:]),
            )


def _beginning(example: Example) -> str:
    """Return what is cut: a plain text, or the first question."""
    if example.text is not None:
        return example.text
    return str(example.messages[_first_question(example)]["content"])


def _with_beginning(example: Example, text: str) -> Example:
    if example.text is not None:
        return replace(example, text=text)
    at = _first_question(example)

    def changed(messages: tuple[dict[str, object], ...]) -> tuple[dict[str, object], ...]:
        return (*messages[:at], messages[at] | {"content": text}, *messages[at + 1 :])

    rejected = changed(example.rejected) if example.rejected else ()
    return replace(example, messages=changed(example.messages), rejected=rejected)


def _first_question(example: Example) -> int:
    return next(i for i, turn in enumerate(example.messages) if turn["role"] == "user")
