"""Make samples fit `data.max_length`, as `data.truncation` says."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial

from rayfin.data.token_settings import TokenSettings, has_system
from rayfin.objectives import Objective
from rayfin.samples import Example, TokenizedSample

Encode = Callable[..., list[TokenizedSample]]
"""Called with examples; returns their samples at full length. Takes other `settings` by name."""

_Shortening = Generator[Example, int, Example]
_Search = Generator[Example, int, tuple[Example, bool]]
"""Yields examples, takes their lengths, and returns one with whether it fits."""


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
    where that is not enough, the earliest calls of tools with their results go instead. The system
    message, the tools and the last answer stay. What is too long even then is cut at the right, as
    all is with `right`. With `drop`, whatever is longer is left out.
    """
    found: list[TokenizedSample | None] = list(samples)
    long = [i for i, sample in enumerate(samples) if len(sample["input_ids"]) > max_length]
    if settings.truncation == "drop":
        for index in long:
            found[index] = None
    elif settings.truncation == "left":
        found = list(_shortened(examples, samples, long, encode, max_length, settings))
    return [None if each is None else objective.truncate(each, max_length) for each in found]


def _shortened(
    examples: Sequence[Example],
    samples: Sequence[TokenizedSample],
    long: Sequence[int],
    encode: Encode,
    max_length: int,
    settings: TokenSettings,
) -> Sequence[TokenizedSample]:
    """Return the samples, the `long` ones without their beginnings."""
    # The tokens don't depend on which answers are learned, and of one alone they take less time.
    measure = partial(encode, settings=replace(settings, train_on="last"))
    attempts = {i: _cut_left(examples[i], max_length) for i in long}
    chosen: dict[int, Example] = {}
    lengths: dict[int, int | None] = dict.fromkeys(attempts)
    while lengths:  # one attempt of each, as one batch
        proposed: dict[int, Example] = {}
        for index, length in lengths.items():
            try:
                attempt = attempts[index]
                proposed[index] = next(attempt) if length is None else attempt.send(length)
            except StopIteration as end:
                chosen[index] = end.value
        measured = measure([*proposed.values()]) if proposed else []
        lengths = {
            index: len(sample["input_ids"])
            for index, sample in zip(proposed, measured, strict=True)
        }
    found = list(samples)
    for index, sample in zip(chosen, encode([*chosen.values()]) if chosen else [], strict=True):
        found[index] = sample
    return found


def _cut_left(example: Example, max_length: int) -> _Shortening:
    """Yield shorter examples, take how many tokens each has, and return the longest that fits.

    So the sample is what the chat template writes of the shorter conversation. Where nothing fits,
    it is that of the last question and answer.
    """
    found, fits = yield from _first_that_fits(_later(example), example, max_length)
    if fits:
        return found
    asked, fits = yield from _without_beginning(found, max_length)
    groups = _without_calls(found)
    if fits or not groups:
        return asked
    found, fits = yield from _first_that_fits(groups, found, max_length)
    if fits:
        return found
    return (yield from _without_beginning(found, max_length))[0]


def _first_that_fits(shorter: Sequence[Example], example: Example, max_length: int) -> _Search:
    """Return the first of ever shorter examples that fits, or the last one, or `example`."""
    low, high = 0, len(shorter)
    while low < high:
        middle = (low + high) // 2
        if (yield shorter[middle]) <= max_length:
            high = middle
        else:
            low = middle + 1
    return [example, *shorter][min(low + 1, len(shorter))], low < len(shorter)


def _without_beginning(example: Example, max_length: int) -> _Search:
    """Return the example with as much of its text as fits, or `example` where not even an end does.

    What is cut is too much by less than a hundredth of `max_length`, in characters.
    """
    text, fitting = _beginning(example), None
    least, most = 0, len(text.rstrip())  # characters to cut: too few, and all
    while most - least > (1 if fitting is None else max(1, max_length // 100)):
        cut = (least + most) // 2
        shorter = _with_beginning(example, text[cut:])
        if (yield shorter) <= max_length:
            fitting, most = shorter, cut
        else:
            least = cut
    return fitting or example, fitting is not None


def _later(example: Example) -> list[Example]:
    """Return a conversation from each later question on, after its system message."""
    head = 1 if has_system(example.messages) else 0
    roles = [turn["role"] for turn in example.messages]
    starts = [start for start, role in enumerate(roles) if role == "user" and start > head]
    return [_without_turns(example, head, start) for start in starts]


def _without_calls(example: Example) -> list[Example]:
    """Return a conversation without its earliest calls of tools, their results with them."""
    if example.text is not None:
        return []
    first = _first_question(example) + 1
    roles = [turn["role"] for turn in example.messages]
    starts = [start for start, role in enumerate(roles) if role == "assistant" and start > first]
    # A rejected answer may itself begin with a call: only what both answers follow is left out.
    return [
        _without_turns(example, first, start)
        for start in starts
        if not example.rejected or example.rejected[:start] == example.messages[:start]
    ]


def _without_turns(example: Example, first: int, end: int) -> Example:
    """Return a conversation without the turns from `first` to before `end`."""
    return replace(
        example,
        messages=(*example.messages[:first], *example.messages[end:]),
        unlearned=tuple(it - end + first for it in example.unlearned if it >= end),
        rejected=(*example.rejected[:first], *example.rejected[end:]),
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
