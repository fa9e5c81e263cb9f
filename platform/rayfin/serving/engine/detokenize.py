"""Decode tokens as they come: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 8
"""Tokens of the prompt that say how the answer's first one is spaced."""
UNRESOLVED = 8
"""Tokens that may wait for their character; a character is at most 4 bytes, a token at least 1."""


class Detokenizer:
    """The text of one request, as far as it is safe to send.

    All pieces together are the decoding of all ids as they follow the prompt, without special
    tokens, and without the clean-up of spaces that some tokenizers do at the end; for a byte-level
    tokenizer that holds for any ids, valid UTF-8 or not. With stop strings the text ends before the
    one that is complete first, and of those that end together, the one that begins first: it
    doesn't depend on how the text is cut into tokens. A special token that a stop string names
    stands in the text that stop strings are looked for in, and in no other.
    """

    # tokenizers' own DecodeStream raises on bytes that revise what it sent, and holds back, at
    # growing cost, for as long as the text ends in a replacement character.

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, prompt_ids: Sequence[int], stop: Sequence[str]
    ) -> None:
        self._backend = tokenizer.backend_tokenizer
        # A window of ids: up to `_start` sent, and decoded again only for its spacing; the rest
        # new, with `_sent` characters of its text handed on.
        self._window = self._spacing(prompt_ids)
        self._start = len(self._window)
        self._context = self._decode(self._window)
        self._fresh = ""
        self._sent = 0
        self._marks = _marks(tokenizer, stop) if stop else {}
        marked = {
            str(self._backend.id_to_token(token_id)): mark for token_id, mark in self._marks.items()
        }
        self._stop = _StopStrings(stop, marked)

    @property
    def stopped(self) -> bool:
        """Return whether a stop string was met: then the text is complete."""
        return self._stop.met

    def push(self, token_id: int) -> str:
        """Return the new text that is safe to send; often empty, and always once `stopped`."""
        if self.stopped:
            return ""
        if self._silent(token_id):
            return self._stop.push(self._marks.get(token_id, ""))
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.startswith(self._context):
            self._fresh = text[len(self._context) :]
        else:  # the context reads otherwise before these bytes: they stand for themselves
            self._fresh = self._decode(self._window[self._start :])
        whole = len(self._fresh.rstrip(REPLACEMENT))
        new = self._take(whole)
        if whole == len(self._fresh):
            self._advance()
        elif len(self._window) - self._start > UNRESOLVED:
            new += self._take(len(self._fresh) - 1)
            self._shorten()
        return self._stop.push(new)

    def flush(self) -> str:
        """Return the rest at the end of generation: half a character shows as U+FFFD."""
        rest = self._stop.push(self._take(len(self._fresh)))
        return rest + self._stop.flush()

    def _spacing(self, prompt_ids: Sequence[int]) -> list[int]:
        """Return the prompt's last tokens, from and to a whole character; none if it ends in half
        of one.

        The decoder of byte-fallback tokens reads a run of bytes as a whole or not at all.
        """
        shown = (token_id for token_id in reversed(prompt_ids) if not self._silent(token_id))
        last = list(islice(shown, CONTEXT))[::-1]
        tails = (last[start:] for start in range(len(last)))
        return next((tail for tail in tails if not self._decode(tail).endswith(REPLACEMENT)), [])

    def _silent(self, token_id: int) -> bool:
        """Return whether no decoding shows a token: a special one, or one that the vocabulary
        lacks.
        """
        if self._decode([token_id]):
            return False
        # A word boundary shows nothing by itself either, but is part of what follows.
        return self._backend.id_to_token(token_id) is None or bool(
            self._backend.decode([token_id], skip_special_tokens=False)
        )

    def _take(self, end: int) -> str:
        """Return the new text from what was handed on up to `end`."""
        text = self._fresh[self._sent : end]
        self._sent = max(self._sent, end)
        return text

    def _advance(self) -> None:
        """Make the new ids, which end in a whole character, the context of the next."""
        del self._window[: self._start]
        self._start = len(self._window)
        self._context = self._decode(self._window)
        self._fresh, self._sent = "", 0

    def _shorten(self) -> None:
        """Keep the last of bytes that make no character, of which all but U+FFFD is sent.

        A UTF-8 decoder finds its feet again within 4 bytes, so their end reads as before.
        """
        del self._window[: -UNRESOLVED // 2]
        self._start, self._context = 0, ""
        self._fresh = self._decode(self._window)
        self._sent = len(self._fresh) - 1

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=True)
        return text


@lru_cache(maxsize=8)  # some vocabularies have thousands of added tokens, and requests are many
def special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Return text -> id of the tokens that no text shows."""
    added = tokenizer.added_tokens_decoder.items()
    return {token.content: token_id for token_id, token in added if token.special}


def _marks(tokenizer: PreTrainedTokenizerFast, stops: Sequence[str]) -> dict[int, str]:
    """Return id -> a character of its own for each special token that a stop string names.

    Halves of surrogate pairs: no decoding gives them.
    """
    named = (
        token_id
        for text, token_id in special_tokens(tokenizer).items()
        if any(text in stop for stop in stops)
    )
    return {token_id: chr(0xD800 + place) for place, token_id in enumerate(islice(named, 0x800))}


class _StopStrings:
    """Passes text on until one of `stops` is met; holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str], marks: Mapping[str, str]) -> None:
        """`marks`: the characters in the place of special tokens, which are never passed on."""
        # As text, too: an answer may spell a special token out.
        written = tuple(stop for stop in stops if stop)
        self._stops = tuple(dict.fromkeys(written + tuple(_with(marks, each) for each in written)))
        self._hidden = dict.fromkeys(map(ord, marks.values()))
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._held = ""
        self.met = False

    def push(self, new: str) -> str:
        if self.met or not new:
            return ""
        if not self._stops:
            return new
        text = self._held + new
        matches = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if matches:
            self.met, self._held = True, ""
            _, start = min((start + len(stop), start) for start, stop in matches)
            return text[:start].translate(self._hidden)
        safe = self._safe(text)
        self._held = text[safe:]
        return text[:safe].translate(self._hidden)

    def flush(self) -> str:
        rest, self._held = self._held, ""
        return rest.translate(self._hidden)

    def _safe(self, text: str) -> int:
        """Return where the longest ending of `text` begins that a stop string begins with."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            ending = text[start:]
            if any(stop.startswith(ending) for stop in self._stops):
                return start
        return len(text)


def _with(marks: Mapping[str, str], stop: str) -> str:
    """Return a stop string with the marks of the special tokens that it names, longest first."""
    for text in sorted(marks, key=len, reverse=True):
        stop = stop.replace(text, marks[text])
    return stop
