"""Write the engine's chunks as OpenAI's choices, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from rayfin.serving.engine.request import Chunk, TokenLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Json = dict[str, Any]

# JSON has no infinity; OpenAI writes this for tokens that can't come.
_NEVER = -9999.0


class TokenTexts:
    """Decodes single tokens, for the log probabilities of an answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        backend = tokenizer.backend_tokenizer
        byte_level = "ByteLevel" in str(backend.decoder)
        special = set(tokenizer.all_special_ids)

        @lru_cache(maxsize=65536)
        def decode(token_id: int) -> tuple[str, tuple[int, ...]]:
            text = backend.decode([token_id], skip_special_tokens=False)
            piece = backend.id_to_token(token_id) or ""
            if byte_level and token_id not in special and all(c in _BYTES for c in piece):
                return text, tuple(_BYTES[character] for character in piece)
            return text, tuple(text.encode())

        self.decode = decode

    def text(self, token_id: int) -> str:
        return self.decode(token_id)[0]

    def as_bytes(self, token_id: int) -> list[int]:
        """Return a token's bytes, also where it is part of a character and the tokenizer works on
        bytes.
        """
        return list(self.decode(token_id)[1])


class ChatChoiceWriter:
    """Writes the choices of /v1/chat/completions."""

    prefix, whole_object, piece_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokens: TokenTexts, *, logprobs: bool) -> None:
        self._tokens, self._logprobs = tokens, logprobs

    def opening(self, index: int) -> Json | None:
        """Return the first piece, before any text."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, chunk: Chunk) -> Json:
        return {
            "index": index,
            "delta": {"content": chunk.text} if chunk.text or not chunk.finish_reason else {},
            "logprobs": self._written(chunk.logprobs),
            "finish_reason": chunk.finish_reason,
        }

    def whole(self, index: int, chunks: Sequence[Chunk]) -> Json:
        text = "".join(chunk.text for chunk in chunks)
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._written(p for chunk in chunks for p in chunk.logprobs),
            "finish_reason": chunks[-1].finish_reason,
        }

    def _written(self, logprobs: Iterable[TokenLogprob]) -> Json | None:
        if not self._logprobs:
            return None
        content = [
            self._one(p.token_id, p.logprob)
            | {"top_logprobs": [self._one(token, logprob) for token, logprob in p.top]}
            for p in logprobs
        ]
        return {"content": content, "refusal": None}

    def _one(self, token: int, logprob: float) -> Json:
        return {
            "token": self._tokens.text(token),
            "logprob": max(logprob, _NEVER),
            "bytes": self._tokens.as_bytes(token),
        }


class CompletionChoiceWriter:
    """Writes the choices of /v1/completions."""

    prefix, whole_object, piece_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, tokens: TokenTexts, *, logprobs: bool) -> None:
        self._tokens, self._logprobs = tokens, logprobs
        self._lengths: dict[int, int] = {}
        """Characters of each choice so far, as its tokens have them."""

    def opening(self, index: int) -> Json | None:
        """Return None: nothing comes before the text."""
        return None

    def piece(self, index: int, chunk: Chunk) -> Json:
        return {
            "index": index,
            "text": chunk.text,
            "logprobs": self._written(index, chunk.logprobs),
            "finish_reason": chunk.finish_reason,
        }

    def whole(self, index: int, chunks: Sequence[Chunk]) -> Json:
        return {
            "index": index,
            "text": "".join(chunk.text for chunk in chunks),
            "logprobs": self._written(index, [p for chunk in chunks for p in chunk.logprobs]),
            "finish_reason": chunks[-1].finish_reason,
        }

    def _written(self, index: int, logprobs: Sequence[TokenLogprob]) -> Json | None:
        if not self._logprobs:
            return None
        texts = [self._tokens.text(p.token_id) for p in logprobs]
        offsets = list(accumulate(map(len, texts), initial=self._lengths.get(index, 0)))
        self._lengths[index] = offsets.pop()
        tops = [
            {self._tokens.text(token): max(logprob, _NEVER) for token, logprob in p.top}
            for p in logprobs
        ]
        return {
            "tokens": texts,
            "token_logprobs": [max(p.logprob, _NEVER) for p in logprobs],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


ChoiceWriter = ChatChoiceWriter | CompletionChoiceWriter


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _byte_alphabet() -> dict[str, int]:
    """Return character -> byte, as byte-level tokenizers write them.

    Printable Latin-1 characters stand for themselves; the other bytes follow from U+0100 on.
    """
    printable = [b for b in range(256) if 33 <= b <= 126 or (161 <= b <= 255 and b != 173)]
    others = sorted(set(range(256)) - set(printable))
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_alphabet()
