"""The engine's interface: requests in from any thread, chunks out, and one thread that computes."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, replace
from typing import Literal

from rayfin.config.schema import ModelConfig
from rayfin.config.serving import EngineConfig
from rayfin.errors import EngineFailed, Overloaded, RequestError
from rayfin.hardware import describe_hardware
from rayfin.heartbeat import beat, pause, seconds_silent, thread_position
from rayfin.models import base_of, load_base, load_tokenizer
from rayfin.models.ends import end_token_ids
from rayfin.serving.engine.adapter import read_adapter
from rayfin.serving.engine.adapter_cache import HostCache
from rayfin.serving.engine.config_checks import check_length
from rayfin.serving.engine.host_adapter import HostAdapter
from rayfin.serving.engine.layout import BaseLayout
from rayfin.serving.engine.model import BatchedModel
from rayfin.serving.engine.request import AdapterSource, Request, Sink, check_prompt
from rayfin.serving.engine.scheduler import Scheduler
from rayfin.serving.engine.sequence import Sequence
from rayfin.serving.engine.vocabulary import Vocabulary

log = logging.getLogger(__name__)

# Steps in a row that may fail before the engine gives up: one bad request is not the engine's end.
_FAILURES = 3


@dataclass(frozen=True)
class EngineStats:
    """Counts since the start, and gauges of what is going on now."""

    waiting: int
    running: int
    finished: int
    prompt_tokens: int
    generated_tokens: int
    steps: int
    slot_hits: int
    slot_fills: int
    slot_evictions: int
    host_loads: int
    host_bytes: int
    table_bytes: int
    """Bytes of the output heads and embeddings that adapters in slots bring of their own."""


class Engine:
    """An engine with one base model and any number of adapters, which answer in one batch.

    Requests join and leave the decoding batch at any step (`Scheduler.step`), which a thread of the
    engine's own runs; all methods may be called from any thread. Raises what loading the model
    raises.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        *,
        use_gpu: bool | Literal["auto"] = "auto",
    ) -> None:
        check_length(model, config)
        self.config, self.model_name, self.max_length = config, model.name, config.max_length
        self.tokenizer = load_tokenizer(model)
        self._words = Vocabulary(self.tokenizer.get_vocab())
        base = load_base(model, config.quantization_bit, describe_hardware(use_gpu).device)
        self.model = BatchedModel(model.name, base, config)
        # After: the engine's own layers are what it looks through, and int8 leaves no others.
        self._layout = replace(
            BaseLayout.of(base, base_of(model)),
            max_rank=config.max_rank,
            max_virtual_tokens=self.max_length - 2,
            max_table_bytes=config.tables_mb * 2**20,
            itemsize=self.model.dtype.itemsize,
            quantization_bit=config.quantization_bit,
        )
        self._changed = threading.Condition()
        self._host = HostCache(
            self.read, config.host_cache_mb * 2**20, self._notify, config.load_seconds
        )
        self._scheduler = Scheduler(
            self.model,
            self._host,
            config,
            frozenset(end_token_ids(model, self.tokenizer)),
            self._changed,
        )
        self._closing = self._draining = False
        self._thread: threading.Thread | None = None
        self.failure: BaseException | None = None
        """Why the engine has stopped working; None while it is well."""

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def health_problem(self) -> str | None:
        """Return why the engine is to be replaced; None while it is well."""
        if self.failure is not None:
            return f"the engine has failed ({type(self.failure).__name__})"
        if self._thread is None or not self._thread.is_alive():
            return "the engine's thread has ended"
        seconds, doing = seconds_silent(self._thread.ident or 0)
        if seconds > self.config.step_seconds:
            where = thread_position(self._thread.ident or 0)
            return f"{doing} has taken {seconds:.0f} s (engine.step_seconds), in {where}"
        return self._host.health_problem

    def close(self, drain_seconds: float = 0.0) -> None:
        """Refuses new requests, lets those at work end for so long, and cancels the rest."""
        deadline = time.monotonic() + drain_seconds
        with self._changed:
            self._draining = True
            while self._scheduler.known and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._host.close()

    def submit(self, request: Request, sink: Sink) -> None:
        """Queues a request; `sink` gets its chunks, the last of which has a finish reason.

        Raises RequestError for one that can never be answered, Overloaded for a full queue.
        """
        check_prompt(request, self.max_length, self.model.vocab_size)
        sequence = Sequence(request, sink, self.tokenizer, self.model.vocab_size)
        scheduler = self._scheduler
        with self._changed:
            if self.failure is not None or self._draining:
                raise Overloaded("the engine takes no requests any more", retry_after=5)
            if request.request_id in scheduler.known:
                raise RequestError(f"request id '{request.request_id}' is in use; give another")
            if (waiting := len(scheduler.waiting)) >= self.config.max_queue:
                raise Overloaded(
                    f"{waiting} requests wait already; try again soon",
                    retry_after=max(1, min(30, waiting // self.config.max_rows)),
                )
            scheduler.known.add(request.request_id)
            scheduler.waiting.append(sequence)
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        """Ends a request at the next step; nothing happens for one that has ended."""
        with self._changed:
            if request_id in self._scheduler.known:
                self._scheduler.cancelled.add(request_id)
                self._changed.notify_all()

    def check(self, source: AdapterSource) -> None:
        """Reads an adapter into host memory; raises AdapterError where it can't be served, and
        Unavailable where it can't be read now.
        """
        self._host.load(source).result()

    def forget(self, ref: str) -> None:
        """Lets a removed version go, from its slot as soon as no row uses it."""
        self._host.forget(ref)
        with self._changed:
            self._scheduler.removed.add(ref)
            self._changed.notify_all()

    def resident(self) -> dict[str, int]:
        """Return the adapters in slots, the latest used first, and the bytes of each."""
        return self._scheduler.slots.resident

    def stats(self) -> EngineStats:
        with self._changed:
            scheduler, slots = self._scheduler, self._scheduler.slots
            return EngineStats(
                waiting=len(scheduler.waiting),
                running=len(scheduler.running),
                finished=scheduler.finished,
                prompt_tokens=scheduler.prompt_tokens,
                generated_tokens=scheduler.generated_tokens,
                steps=scheduler.steps,
                slot_hits=slots.hits,
                slot_fills=slots.fills,
                slot_evictions=slots.evictions,
                host_loads=self._host.loads,
                host_bytes=self._host.bytes,
                table_bytes=slots.table_bytes,
            )

    def read(self, source: AdapterSource) -> HostAdapter:
        """Read an adapter from disk, for the slots of this engine; raises AdapterError."""
        adapter = read_adapter(source, self._layout)
        self._words.check(source)
        adapter.check_range(self.model.dtype)
        return adapter

    # --- the engine's thread ------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # nobody may wait for a thread that is no more
            log.exception("the engine has failed")
            self._fail(error)
        if self.failure is not None:
            why = EngineFailed("the engine has stopped; the server's log says why")
            self._scheduler.end_all("error", why)
        else:
            self._scheduler.end_all("cancelled")

    def _fail(self, error: BaseException) -> None:
        # Guarded: a request that `submit` takes now is among those that are told, or refused.
        with self._changed:
            self.failure = error

    def _work(self) -> None:
        failures = 0
        while not self._closing:
            try:
                beat("a step of the engine")
                worked = self._scheduler.step()
                failures = 0
            except Exception as error:
                log.exception("a step failed")
                failures += 1
                worked = True
                # What torch says of it may tell of the server's inside: that is for its log.
                why = EngineFailed(f"a step of the engine failed ({type(error).__name__})")
                self._scheduler.end_running("error", why)
                if failures >= _FAILURES:
                    self._fail(error)
                    break
            if not worked:
                pause()
                with self._changed:
                    if not self._closing and not self._scheduler.has_work:
                        self._changed.wait(timeout=1.0)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
