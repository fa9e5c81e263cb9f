"""The ends of an answer: the model's own end tokens, and what a chat template writes after it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfin.config.schema import ModelConfig
from rayfin.models.source import model_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TURN = "end_of_turn"
"""The key of rayfin.json for the ends that an adapter was taught."""

_QUESTION, _ANSWER, _NEXT = "qzquestionqz", "qzanswerqz", "qznextqz"
PROBES: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}),
    (
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _NEXT},
    ),
)
"""Conversations whose rendering by a chat template shows what follows an answer."""

# An adapter is taught fewer and shorter ends. rayfin.json may be anybody's.
_MAX_ENDS = 16
_MAX_TEXT = 256


@dataclass(frozen=True)
class Ends:
    """The tokens and texts that end an answer."""

    token_ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    """The ends without a token, such as a template's `<|im_end|>` that was not added as one."""

    def __or__(self, other: Ends) -> Ends:
        return Ends(
            tuple(dict.fromkeys(self.token_ids + other.token_ids)),
            tuple(dict.fromkeys(self.texts + other.texts)),
        )

    def as_json(self, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        """Return the ends as rayfin.json stores them: the tokens with their ids, and the texts."""
        tokens = zip(
            tokenizer.convert_ids_to_tokens(list(self.token_ids)), self.token_ids, strict=True
        )
        return {"tokens": dict(tokens), "texts": list(self.texts)}

    @classmethod
    def from_json(cls, value: Any, tokenizer: PreTrainedTokenizerFast) -> Ends:
        """Parse what `as_json` returned.

        Raises ValueError, which says what is wrong, for any other value, and for tokens that have
        other ids in `tokenizer`.
        """
        if not isinstance(value, Mapping) or value.keys() - {"tokens", "texts"}:
            raise ValueError("it has other keys than tokens and texts")
        tokens, texts = value.get("tokens", {}), value.get("texts", [])
        if not isinstance(tokens, Mapping) or not isinstance(texts, list):
            raise ValueError("tokens must be a mapping of tokens to ids, and texts a list")
        if len(tokens) + len(texts) > _MAX_ENDS:
            raise ValueError(f"it names {len(tokens) + len(texts)} ends; at most {_MAX_ENDS}")
        # convert_tokens_to_ids would give the unknown token's id for one that isn't there.
        backend = tokenizer.backend_tokenizer
        for token, token_id in tokens.items():
            if type(token_id) is not int or backend.token_to_id(token) != token_id:
                raise ValueError(
                    f"it says that {str(token)[:80]!r} is token {str(token_id)[:80]}, "
                    "which the served base's tokenizer does not say"
                )
        for text in texts:
            if not isinstance(text, str) or not 0 < len(text) <= _MAX_TEXT:
                raise ValueError(f"a text must have 1 to {_MAX_TEXT} characters")
        return cls(tuple(tokens.values()), tuple(texts))


def end_token_ids(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Return the ids of the tokens that end any text of the model, ascending.

    They are those of its generation_config.json and config.json, each a number or a list of
    numbers, and the tokenizer's own.
    """
    directory = model_directory(config, weights=False)
    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        named = _read(directory / name).get("eos_token_id")
        found.update(named if isinstance(named, list) else [named])
    return tuple(sorted(token for token in found if type(token) is int and token >= 0))


def turn_ends(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Ends:
    """Return what ends an answer in a conversation, as its chat template writes it.

    `texts` are what the template made of `PROBES`, in their order; an empty text stands for a
    conversation that it refused. The end is the first token after the answer that was added to
    the vocabulary (`<|im_end|>`, of `<|im_end|>` and a line break), or else all of the text there
    without white space around it. Where the template writes nothing after the last turn of a
    conversation, it is the token by which the next turn opens, or else the end-of-sequence token;
    training adds it there.
    """
    first, *following = texts
    after = after_answer(first)
    if (end := _first_added(after, tokenizer)) is not None:
        return Ends((end,))
    if text := after.strip():
        return Ends(texts=(text,)) if len(text) <= _MAX_TEXT else Ends()
    for text in following:
        between, found, _ = after_answer(text).partition(_NEXT)
        if found and (end := _first_added(between, tokenizer)) is not None:
            return Ends((end,))
    eos = tokenizer.eos_token_id
    return Ends((eos,)) if leaves_open(first) and isinstance(eos, int) else Ends()


def leaves_open(text: str) -> bool:
    """Whether the rendering of the first of `PROBES` ends with its answer and white space."""
    return _ANSWER in text and not after_answer(text).strip()


def shows_answer(text: str) -> bool:
    """Whether the rendering of a probe has its answer as it was given."""
    return _ANSWER in text


def after_answer(text: str) -> str:
    """Return what follows the answer of a probe, or '' where the template changed the answer."""
    return text.rpartition(_ANSWER)[2] if _ANSWER in text else ""


def _first_added(text: str, tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Return the first token of a text that was added to the vocabulary and is not white space."""
    added = tokenizer.added_tokens_decoder
    # The backend: the class around it sets padding and truncation, which threads may not share.
    ids: Sequence[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return next((id_ for id_ in ids if id_ in added and added[id_].content.strip()), None)


def _read(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one where there is none or it can't be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
