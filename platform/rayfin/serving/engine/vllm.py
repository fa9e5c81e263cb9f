"""vLLM with the interface of rayfin's own engine: LoRA adapters, on the GPUs that vLLM knows.

vLLM keeps an adapter's weights under a number, and computed prefixes under a name. Every version
gets a number and a name that no other ever had (`vllm_adapters.py`): a new version is never
answered with the weights of an old one.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from rayfin.config.schema import ModelConfig
from rayfin.config.serving import EngineConfig
from rayfin.errors import EngineFailed, RayfinError
from rayfin.heartbeat import seconds_silent
from rayfin.models import base_of, load_tokenizer, meta_model
from rayfin.models.ends import end_token_ids
from rayfin.serving.engine.config_checks import check_length
from rayfin.serving.engine.detokenize import special_tokens
from rayfin.serving.engine.layout import linears_of
from rayfin.serving.engine.request import AdapterSource, Request, Sink, check_prompt
from rayfin.serving.engine.request_tasks import RequestTasks, no_more_requests
from rayfin.serving.engine.vllm_adapters import VllmAdapters, VllmHeartbeat
from rayfin.serving.engine.vllm_backend import (
    Vllm,
    VllmBackend,
    as_chunk,
    as_vllm_stops,
    check_lora,
    vllm_arguments,
)
from rayfin.serving.engine.vocabulary import Vocabulary


@dataclass(frozen=True)
class VllmStats:
    """Counts since the start, and gauges of what is going on now."""

    waiting: int
    """vLLM keeps its own queue: requests beyond engine.max_rows."""
    running: int
    finished: int
    prompt_tokens: int
    generated_tokens: int


class VllmEngine:
    """An engine that answers by vLLM; all methods may be called from any thread.

    Raises ConfigError where vLLM isn't installed or can't have these settings, ModelError where it
    doesn't start.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        open_backend: Callable[[Mapping[str, Any]], VllmBackend] | None = None,
    ) -> None:
        """Prepare the engine; `open_backend` is given vLLM's arguments, on the event loop that is
        to be used.
        """
        check_length(model, config)
        self.config, self.model_name, self.max_length = config, model.name, config.max_length
        self.tokenizer = load_tokenizer(model)
        self._words = Vocabulary(self.tokenizer.get_vocab())
        self._ends = end_token_ids(model, self.tokenizer)
        self._special_tokens = special_tokens(self.tokenizer)
        self._base = base_of(model)
        bare = meta_model(model)
        self._linears = linears_of(bare)
        self._vocabulary: int = bare.config.get_text_config().vocab_size
        self._arguments = vllm_arguments(model, config)
        self._open_backend = open_backend or Vllm
        self._progress = VllmHeartbeat()
        self._adapters = VllmAdapters(self._size, config, self._progress)
        self._prompt_tokens = self._generated_tokens = 0
        self._backend: VllmBackend | None = None
        self._loop = asyncio.new_event_loop()
        self._requests = RequestTasks(self._loop, self._answer, _failure)
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)

    def start(self) -> None:
        """Loads the model."""

        async def begin() -> None:
            self._backend = self._adapters.backend = self._open_backend(self._arguments)

        self._thread.start()
        asyncio.run_coroutine_threadsafe(begin(), self._loop).result()

    @property
    def failure(self) -> BaseException | None:
        return None if self._backend is None else self._backend.failure

    @property
    def health_problem(self) -> str | None:
        """Return why the engine is to be replaced; None while it is well."""
        if self.failure is not None:
            return f"vLLM has failed ({type(self.failure).__name__})"
        if self._backend is None or not self._thread.is_alive():
            return "the engine's thread has ended"
        seconds, doing = seconds_silent(self._thread.ident or 0)
        if seconds > self.config.step_seconds:
            return f"{doing} has taken {seconds:.0f} s (engine.step_seconds)"
        return self._adapters.health_problem

    def close(self, drain_seconds: float = 0.0) -> None:
        """Refuses new requests, lets those at work end for so long, and cancels the rest."""
        self._requests.drain(drain_seconds)
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request, as `Engine.submit` does."""
        check_prompt(request, self.max_length, len(self.tokenizer))
        request = as_vllm_stops(request, self._ends, self._special_tokens, self._vocabulary)
        if self.failure is not None or self._backend is None:
            raise no_more_requests()
        self._requests.submit(request, sink, most=self.config.max_rows + self.config.max_queue)

    def cancel(self, request_id: str) -> None:
        self._requests.cancel(request_id)

    def check(self, source: AdapterSource) -> None:
        """Reads an adapter; raises AdapterError where vLLM can't serve it, or not exactly, and
        Unavailable where it can't be read now.
        """
        self._adapters.check(source)

    def _size(self, source: AdapterSource) -> int:
        """Return the bytes of an adapter, which is checked."""
        size = check_lora(source, self._base, self._linears, self.config.max_rank)
        self._words.check(source)
        return size

    def forget(self, ref: str) -> None:
        """Lets a removed version go as soon as no request uses it."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._adapters.forget, ref)

    def resident(self) -> dict[str, int]:
        """Return the adapters that were used last, as many as there are slots, and their bytes."""
        return self._adapters.resident()

    def stats(self) -> VllmStats:
        known = len(self._requests)
        running = min(known, self.config.max_rows)
        return VllmStats(
            known - running,
            running,
            self._requests.finished,
            self._prompt_tokens,
            self._generated_tokens,
        )

    # --- in the event loop --------------------------------------------------------------------

    async def _end(self) -> None:
        await self._requests.cancel_all()
        await self._adapters.close()
        if self._backend is not None:
            self._backend.close()

    async def _answer(self, request: Request, sink: Sink) -> None:
        """Hand on what vLLM sends."""
        assert self._backend is not None
        async with self._adapters.held(request.adapter) as lora:
            self._prompt_tokens += len(request.prompt_ids)
            outputs = self._backend.generate(request, lora)
            with self._progress.expected():
                async with aclosing(outputs):
                    async for output in outputs:
                        self._progress.made()
                        chunk = as_chunk(output.outputs[0], request.params.logprobs)
                        self._generated_tokens += len(chunk.token_ids)
                        sink(chunk)


def _failure(error: BaseException) -> RayfinError:
    if isinstance(error, RayfinError):
        return error
    return EngineFailed(f"vLLM failed at this request ({type(error).__name__})")
