"""The engine's requests and the chunks of their answers; loads no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rayfin.errors import ContextLengthError, RayfinError, RequestError
from rayfin.models.ends import Ends

FinishReason = Literal["stop", "length", "cancelled", "error"]

MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKENS = 128


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen; names and meanings are OpenAI's, and vLLM's beyond them.

    Raises RequestError for a value that can't be used.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 considers all tokens."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Keskar et al. 2019 (arXiv:1909.05858); over the prompt and what was generated."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Both over what was generated."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these; it is not part of the text. One that holds a
    special token's text (`<|im_end|>`) is met by that token, which no text shows."""
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends at the first of these; its text is not part of the answer's."""
    ignore_eos: bool = False
    """Goes on after all that ends an answer but `stop` and `stop_token_ids`."""
    seed: int | None = None
    logprobs: int | None = None
    """Report the log probability of each token, and of so many of the likeliest."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "seed", "logprobs"):
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                raise RequestError(f"{name} is {value!r}; give a whole number")
        if type(self.stop) is not tuple:
            raise RequestError(f"stop is {self.stop!r}; give a tuple of texts")
        if type(self.stop_token_ids) is not tuple or any(
            type(token) is not int for token in self.stop_token_ids
        ):
            raise RequestError(
                f"stop_token_ids is {self.stop_token_ids!r}; give a tuple of whole numbers"
            )
        _within("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("top_p", self.top_p, 0.0, 1.0, above=True)
        _within("top_k", self.top_k, 0, 2**31 - 1)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 10.0, above=True)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _within("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        if len(self.stop) > MAX_STOPS:
            raise RequestError(f"stop has {len(self.stop)} strings; at most {MAX_STOPS}")
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_LENGTH:
                raise RequestError(
                    f"a stop string has {len(text)} characters; give 1 to {MAX_STOP_LENGTH}"
                )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True)
class AdapterSource:
    """One immutable adapter version: its unique `ref` (`support@3`) and its PEFT directory."""

    ref: str
    path: Path


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token, its log probability (nats), and the likeliest tokens in its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Chunk:
    """What one request gained in one step; the last chunk has a finish reason."""

    text: str
    """Whole characters only; what might be the beginning of a stop string is held back."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: RayfinError | None = None
    """Why, where finish_reason is `error`; an Overloaded or RequestError says what `submit` would
    have raised, had the engine been here."""


@dataclass(frozen=True)
class Request:
    """One sequence to generate. The adapter version that it names is the one that answers."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    adapter: AdapterSource | None = None
    """None is the bare base model."""
    streamed: bool = True
    """False where chunks between the first and the last may come late, joined to the last."""
    ends: Ends = field(default_factory=Ends)
    """What ends this answer beside the base's own tokens: what the adapter was taught, and what
    the chat template ends a turn with."""

    @property
    def end_texts(self) -> tuple[str, ...]:
        """Return all texts before the first of which generation ends."""
        return self.params.stop + (() if self.params.ignore_eos else self.ends.texts)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Return all tokens at which generation ends, but for the base's own."""
        own = () if self.params.ignore_eos else self.ends.token_ids
        return tuple(dict.fromkeys(self.params.stop_token_ids + own))


Sink = Callable[[Chunk], None]
"""Called on the engine's thread, in order; must return at once and not raise."""


def check_prompt(request: Request, max_length: int, vocabulary: int) -> None:
    """Raises RequestError for a prompt, or tokens to stop at, that no replica would take."""
    check_stop_tokens(request.params.stop_token_ids, vocabulary)
    if not request.prompt_ids:
        raise RequestError("the prompt is empty; give at least one token")
    if len(request.prompt_ids) >= max_length:
        raise ContextLengthError(
            f"the prompt has {len(request.prompt_ids)} tokens, and {max_length} have room with "
            "their answer; shorten it, or raise engine.max_length"
        )
    if max(request.prompt_ids) >= vocabulary or min(request.prompt_ids) < 0:
        raise RequestError(f"a prompt token is outside the vocabulary of {vocabulary}")


def check_stop_tokens(token_ids: Sequence[int], vocabulary: int) -> None:
    """Raises RequestError for a token that no model with so many could give."""
    for token in token_ids:
        if not 0 <= token < vocabulary:
            raise RequestError(
                f"stop_token_ids has {token}, and the served model's vocabulary is 0 to "
                f"{vocabulary - 1}; POST /tokenize gives the ids of a text"
            )


def _within(name: str, value: float, least: float, most: float, *, above: bool = False) -> None:
    """Raises RequestError unless least <= value <= most (least < value with `above`)."""
    number = isinstance(value, int) or math.isfinite(value)
    fits = number and least <= value <= most and not (above and value == least)
    if not fits:
        low = f"above {least:g}" if above else f"from {least:g}"
        raise RequestError(f"{name} is {value}; give a number {low} to {most:g}")
