"""Decide which tokens are computed next: admission, the running batch, and how each row ends."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Collection, Iterable
from concurrent.futures import Future

from rayfin.config.serving import EngineConfig
from rayfin.errors import (
    AdapterError,
    ContextLengthError,
    EngineFailed,
    RayfinError,
    Unavailable,
)
from rayfin.serving.engine.adapter_cache import HostCache, SlotCache
from rayfin.serving.engine.batch import RowSpan
from rayfin.serving.engine.host_adapter import HostAdapter
from rayfin.serving.engine.model import BatchedModel
from rayfin.serving.engine.request import AdapterSource, FinishReason, TokenLogprob
from rayfin.serving.engine.sampler import INVALID, sample
from rayfin.serving.engine.sequence import Sequence

log = logging.getLogger(__name__)

# A request that waits for a slot lets so many others pass before they wait behind it.
_PATIENCE = 32
# Adapters that are being read for requests at a time: what they take is not known before.
_READING = 4


class Scheduler:
    """Schedules the requests that wait and the rows that run; one thread calls `step`.

    `changed` guards what other threads look at (`waiting`, `running`, `known`, `cancelled`), and
    is notified whenever a request has ended.
    """

    def __init__(
        self,
        model: BatchedModel,
        host: HostCache,
        config: EngineConfig,
        ends: frozenset[int],
        changed: threading.Condition,
    ) -> None:
        """Begin without requests; `ends` are the base's tokens that end an answer."""
        self._model, self._host, self._config, self._ends = model, host, config, ends
        self._changed = changed
        self.slots = SlotCache(config.slots, model, config.tables_mb * 2**20)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.known: set[str] = set()
        """Ids of the requests that wait or run."""
        self.cancelled: set[str] = set()
        self.removed: set[str] = set()
        """Adapter versions that are to leave their slots."""
        self._free_rows = list(range(config.max_rows - 1, -1, -1))
        self.finished = self.steps = self.prompt_tokens = self.generated_tokens = 0

    def step(self) -> bool:
        """Admit requests, compute a step, and hand one token on to every row that decodes.

        False where there was nothing to compute.
        """
        self._drop_cancelled()
        self._drop_removed()
        self._admit()
        if not (pieces := self._schedule()):
            return False
        asking, logits = self._model.forward(pieces)
        self._advance(pieces)
        if asking:
            self._hand_on(asking, sample(logits, [s.sampler for s in self._rows(asking)]))
        self.steps += 1
        return True

    def end_running(self, reason: FinishReason, why: RayfinError | None = None) -> None:
        for sequence in list(self.running):
            self._free(sequence)
            sequence.end(reason, why)

    def end_all(self, reason: FinishReason, why: RayfinError | None = None) -> None:
        self.end_running(reason, why)
        for sequence in list(self.waiting):
            self._end_waiting(sequence, reason, why)

    @property
    def has_work(self) -> bool:
        """Return whether a step would find something to do; a load that ends is told otherwise."""
        if self.running or self.cancelled or self.removed:
            return True
        return any(not s.held_back if s.loading is None else s.loading.done() for s in self.waiting)

    # --- admission --------------------------------------------------------------------------

    def _admit(self) -> None:
        """Gives waiting requests a row and their adapter's slot, first come first served.

        One whose adapter is still being read is passed over; one that finds every slot in use is
        passed over a limited number of times.
        """
        with self._changed:
            waiting = list(self.waiting)
        for place, sequence in enumerate(waiting):
            is_full = not self._free_rows
            if is_full or not self._acquired(sequence):
                if is_full or sequence.passed_over >= _PATIENCE:
                    for other in waiting[place:]:
                        other.wait_for_others()
                    break
                continue
            with self._changed:
                self.waiting.remove(sequence)
                self.running.append(sequence)
            for other in waiting:
                if other is sequence:
                    break
                other.passed_over += other.blocked

    def _acquired(self, sequence: Sequence) -> bool:
        """Call `_acquire`; an unforeseen failure ends this sequence and no other."""
        try:
            return self._acquire(sequence)
        except Exception as error:
            log.exception("request %s could not begin", sequence.request.request_id)
            if sequence.row >= 0:
                self._give_up_row(sequence)
            why = EngineFailed(f"the request could not begin ({type(error).__name__})")
            self._end_waiting(sequence, "error", why)
            return False

    def _acquire(self, sequence: Sequence) -> bool:
        """Gives a sequence its slot and row; False where its adapter isn't there yet."""
        source = sequence.request.adapter
        slot = 0
        if source is not None:
            adapter: HostAdapter | None = None
            if not self.slots.holds(source.ref):
                try:
                    adapter = self._loaded(sequence, source)
                except RayfinError as error:
                    self._end_waiting(sequence, "error", error)
                    return False
                if adapter is None:
                    return False
            sequence.blocked = not self.slots.may_acquire(source.ref, adapter)
            if sequence.blocked:
                return False
            try:
                slot = self.slots.acquire(source.ref, adapter)
            except (RuntimeError, MemoryError):  # no memory for the slots to grow, say
                log.exception("adapter '%s' does not fit", source.ref)
                why = EngineFailed(f"no memory is left for adapter '{source.ref}'")
                self._end_waiting(sequence, "error", why)
                return False
        virtual = self._model.virtual_tokens(slot)
        if virtual + len(sequence.request.prompt_ids) >= self._config.max_length:
            if source is not None:
                self.slots.release(source.ref)
            too_long = ContextLengthError(
                f"the prompt has {len(sequence.request.prompt_ids)} tokens, and the adapter's "
                f"{virtual} virtual ones leave room for {self._config.max_length - virtual - 1}"
            )
            self._end_waiting(sequence, "error", too_long)
            return False
        sequence.loading = None
        sequence.begin(
            self._free_rows.pop(),
            slot,
            self._model.embedded_tokens(slot),
            virtual,
            self._config.max_length,
        )
        self._model.begin_row(sequence.row, slot)
        self.prompt_tokens += len(sequence.request.prompt_ids)
        return True

    def _loaded(self, sequence: Sequence, source: AdapterSource) -> HostAdapter | None:
        """Return the sequence's adapter, None until it has been read; raises what reading it
        raises.

        Raises Unavailable where the sequence has waited for reads, its adapter's or those before
        it, for engine.load_seconds.
        """
        if sequence.loading is None:
            before = self._loads_before(source)
            sequence.held_back = self._is_enough(before, is_read=self._host.holds(source.ref))
            if not sequence.held_back:
                sequence.loading = self._host.load(source)
            elif all(load.done() for load in before):
                sequence.wait_for_others()  # they have been read, and wait for slots
                return None
        if sequence.loading is not None and sequence.loading.done():
            return sequence.loading.result()
        seconds = self._config.load_seconds
        if sequence.wait_for_reads() >= seconds:
            raise Unavailable(
                f"adapter '{source.ref}' is being read, or others before it are, and that did not "
                f"end in {seconds:g} s; try again later"
            )
        return None

    def _loads_before(self, source: AdapterSource) -> list[Future[HostAdapter]]:
        """Return one load for each adapter that others wait for; none where the adapter is among
        them.
        """
        with self._changed:
            held = {
                other.request.adapter.ref: other.loading
                for other in self.waiting
                if other.loading is not None and other.request.adapter is not None
            }
        return [] if source.ref in held else list(held.values())

    def _is_enough(self, loads: Collection[Future[HostAdapter]], *, is_read: bool) -> bool:
        """Return whether to load no more: what waits outside the host cache is held by its request,
        and a long queue must not hold a hundred adapters, nor a few large ones.

        An adapter that `is_read` already waits for no read of another's, which may hang.
        """
        done = [load for load in loads if load.done()]
        if is_read:
            loads = done
        read = [load.result() for load in done if load.exception() is None]
        return (
            len(loads) > self._config.slots
            or len(loads) - len(done) >= _READING
            or sum(adapter.nbytes for adapter in read) > self._config.host_cache_mb * 2**20
        )

    # --- a step -----------------------------------------------------------------------------

    def _schedule(self) -> list[RowSpan]:
        """Return a token of every row that decodes, and as much of prompts as a step may take."""
        decoding = [s for s in self.running if s.remaining == 1]
        pieces = [s.piece(1) for s in decoding]
        room = self._config.prefill_chunk if pieces else 4 * self._config.prefill_chunk
        for sequence in self.running:
            if room > 0 and sequence.remaining > 1:
                pieces.append(sequence.piece(min(room, sequence.remaining)))
                room -= len(pieces[-1].token_ids)
        return pieces

    def _advance(self, pieces: Iterable[RowSpan]) -> None:
        by_row = {sequence.row: sequence for sequence in self.running}
        for piece in pieces:
            by_row[piece.row].computed = piece.stop

    def _hand_on(
        self, asking: Iterable[RowSpan], choices: Iterable[tuple[int, TokenLogprob | None]]
    ) -> None:
        for sequence, (token, logprob) in zip(self._rows(asking), choices, strict=True):
            if token == INVALID:
                self._free(sequence)
                sequence.end("error", _not_numbers(sequence))
                continue
            chunk = sequence.take(token, logprob, self._ends)
            self.generated_tokens += 1
            if chunk.finish_reason is not None:
                self._free(sequence)  # before its last word: who has that sees the row free
            if not sequence.hand_over(chunk) and chunk.finish_reason is None:
                self._free(sequence)

    def _rows(self, pieces: Iterable[RowSpan]) -> list[Sequence]:
        by_row = {sequence.row: sequence for sequence in self.running}
        return [by_row[piece.row] for piece in pieces]

    # --- ends -------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        with self._changed:
            cancelled = set(self.cancelled)
            waiting = [s for s in self.waiting if s.request.request_id in cancelled]
        for sequence in waiting:
            self._end_waiting(sequence, "cancelled")
        for sequence in [s for s in self.running if s.request.request_id in cancelled]:
            self._free(sequence)
            sequence.end("cancelled")

    def _drop_removed(self) -> None:
        with self._changed:
            removed = set(self.removed)
        for ref in removed:
            if self.slots.forget(ref):
                with self._changed:
                    self.removed.discard(ref)

    def _end_waiting(
        self, sequence: Sequence, reason: FinishReason, why: RayfinError | None = None
    ) -> None:
        with self._changed:
            self.waiting.remove(sequence)
            self._forget(sequence)
        sequence.end(reason, why)

    def _free(self, sequence: Sequence) -> None:
        """Takes a running sequence out of the batch."""
        try:
            self._model.end_row(sequence.row, len(sequence.tokens))
        except RuntimeError:  # a device that is gone; the next step says so
            log.exception("a row could not be cleared")
        self._give_up_row(sequence)
        with self._changed:
            self.running.remove(sequence)
            self._forget(sequence)

    def _give_up_row(self, sequence: Sequence) -> None:
        self._free_rows.append(sequence.row)
        # The lowest rows first: attention is computed up to the highest that decodes.
        self._free_rows.sort(reverse=True)
        if sequence.request.adapter is not None:
            self.slots.release(sequence.request.adapter.ref)

    def _forget(self, sequence: Sequence) -> None:
        self.known.discard(sequence.request.request_id)
        self.cancelled.discard(sequence.request.request_id)
        self.finished += 1
        self._changed.notify_all()


def _not_numbers(sequence: Sequence) -> RayfinError:
    what = "scores for the next token that are not numbers"
    if (source := sequence.request.adapter) is None:
        return EngineFailed(f"the model gave {what}")
    return AdapterError(f"adapter '{source.ref}' gave {what}; train it again, with a lower rate")
