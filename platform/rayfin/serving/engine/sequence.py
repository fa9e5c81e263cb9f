"""The state of one request in the engine."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

from rayfin.serving.engine.batch import RowSpan
from rayfin.serving.engine.detokenize import Detokenizer
from rayfin.serving.engine.host_adapter import HostAdapter
from rayfin.serving.engine.request import Chunk, FinishReason, Request, Sink, TokenLogprob
from rayfin.serving.engine.sampler import RowSampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from rayfin.errors import RayfinError

log = logging.getLogger(__name__)


class Sequence:
    """A request's tokens, how many of them the cache holds, and what is left to send."""

    def __init__(
        self, request: Request, sink: Sink, tokenizer: PreTrainedTokenizerFast, vocab_size: int
    ) -> None:
        self.request, self._sink = request, sink
        self.sampler = RowSampler(request.params, request.prompt_ids, vocab_size)
        self._text = Detokenizer(tokenizer, request.prompt_ids, request.end_texts)
        self._ends = frozenset(request.end_token_ids)
        self.row = self.slot = -1
        self.tokens: list[int] = []
        """Virtual ones (-1), the prompt's, and what was generated."""
        self.computed = 0
        """Tokens whose keys and values are in the cache."""
        self._limit = 0
        self.loading: Future[HostAdapter] | None = None
        self.held_back = False
        """Its adapter is not to be read yet: enough is, for those before it."""
        self._read_wait = 0.0
        self._reads_since: float | None = None
        self.blocked = False
        """Waits for a slot, and not for its adapter."""
        self.passed_over = 0

    def wait_for_reads(self) -> float:
        """Return the seconds that it has waited for adapters to be read, from each call to the
        next.
        """
        now = time.monotonic()
        if self._reads_since is not None:
            self._read_wait += now - self._reads_since
        self._reads_since = now
        return self._read_wait

    def wait_for_others(self) -> None:
        """Count no more time: the sequence waits for a row or a slot, and for no disk."""
        self._reads_since = None

    def begin(self, row: int, slot: int, embedded: int, virtual: int, max_length: int) -> None:
        """Take a row and a slot; `virtual` tokens come first: `embedded` of them computed, the
        others in the cache.
        """
        self.row, self.slot = row, slot
        self.tokens = [-1] * virtual + list(self.request.prompt_ids)
        self.computed = virtual - embedded
        self._limit = min(len(self.tokens) + self.request.params.max_tokens, max_length)

    @property
    def remaining(self) -> int:
        """Return how many tokens are to be computed: 1 while decoding, more while the prompt is
        taken in.
        """
        return len(self.tokens) - self.computed

    def piece(self, count: int) -> RowSpan:
        stop = self.computed + count
        ids = self.tokens[self.computed : stop]
        return RowSpan(self.row, self.slot, self.computed, ids, stop == len(self.tokens))

    def take(self, token: int, logprob: TokenLogprob | None, ends: frozenset[int]) -> Chunk:
        """Adds a generated token, and returns what it brings, for `hand_over`.

        `ends`: the base's own tokens that end an answer.
        """
        self.tokens.append(token)
        reason: FinishReason | None = None
        if token in self._ends or (token in ends and not self.request.params.ignore_eos):
            text, reason = self._text.flush(), "stop"
        else:
            text = self._text.push(token)
            if self._text.stopped:
                reason = "stop"
            elif len(self.tokens) >= self._limit:
                text, reason = text + self._text.flush(), "length"
        return Chunk(text, (token,), () if logprob is None else (logprob,), reason)

    def end(self, reason: FinishReason, why: RayfinError | None = None) -> None:
        """Tells who asked that nothing more comes."""
        self.hand_over(Chunk("", (), finish_reason=reason, error=why))

    def hand_over(self, chunk: Chunk) -> bool:
        """Give the sink a chunk; return False where it fails, so that other rows go on."""
        try:
            self._sink(chunk)
        except Exception:
            log.exception("request %s: its sink failed", self.request.request_id)
            return False
        return True
