"""A replica with an engine in its process, and the calls that Serve brings it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from typing import Any

import ray

from rayfin.adapters.served_catalog import ServedCatalog
from rayfin.config.serving import ServeConfig
from rayfin.errors import RayfinError
from rayfin.paths import Storage
from rayfin.serving.engine.open import open_engine
from rayfin.serving.engine.request import Chunk, FinishReason, Request
from rayfin.serving.replica_cleanup import ReplicaCleanup
from rayfin.serving.replica_metrics import ENGINE, ReplicaCounters, engine_counters
from rayfin.serving.routing import RESIDENT, STATS

# A message between two replicas costs about a millisecond of each one's processor: so many a
# second are sent for all streams together, whose chunks are joined meanwhile.
_MESSAGES_PER_SECOND = 100.0
_LONGEST_WAIT = 0.25


class EngineReplica:
    """A replica of the engine deployment; Serve calls its methods on one event loop."""

    def __init__(self, config: ServeConfig, use_gpu: bool) -> None:
        self._engine = open_engine(config.model, config.engine, use_gpu=use_gpu)
        self._cleanup = ReplicaCleanup(
            self._engine, ServedCatalog(Storage.at(config.storage).adapters)
        )
        self._streams = 0
        self._counts = (
            ReplicaCounters(ENGINE, lambda: engine_counters(self._engine.stats()))
            if ray.is_initialized()
            else None  # there are no others
        )

    async def generate(
        self, request: Request, caller: str | None, *, adapter: str | None
    ) -> AsyncIterator[Chunk]:
        """Yield the request's chunks, as many joined as have come; closing it frees the row.

        `caller` is the name of the actor that asks, and `adapter` is for the router. A request
        that the engine refuses gets one chunk, whose error says why.
        """
        outbox = ChunkQueue(asyncio.get_running_loop())
        self._cleanup.begun(request, caller)
        try:
            self._engine.submit(request, outbox.put)
        except RayfinError as error:
            self._cleanup.ended(request)
            yield Chunk("", (), finish_reason="error", error=error)
            return
        self._streams += 1
        try:
            ended = False
            while not ended:
                chunk = merge_chunks(await outbox.take())
                yield chunk
                ended = chunk.finish_reason is not None
                if not ended:
                    wait = min(_LONGEST_WAIT, self._streams / _MESSAGES_PER_SECOND)
                    await outbox.gather(wait if request.streamed else None)
        finally:
            self._streams -= 1
            self._engine.cancel(request.request_id)
            self._cleanup.ended(request)

    async def ping(self) -> None:
        """Answer, so that a caller's router learns of the replicas."""

    # --- what Serve asks for ------------------------------------------------------------------

    def record_routing_stats(self) -> dict[str, Any]:
        return {RESIDENT: self._engine.resident(), STATS: asdict(self._engine.stats())}

    def check_health(self) -> None:
        """Raises where the engine has given up: Serve replaces the replica."""
        if self._engine.failure is not None:
            raise RuntimeError("the engine has failed") from self._engine.failure
        if (health_problem := self._engine.health_problem) is not None:
            raise RuntimeError(health_problem)

    def __del__(self) -> None:
        # Serve calls this when the replica is to stop, and has waited for its requests to end.
        if hasattr(self, "_cleanup"):
            self.close()

    def close(self) -> None:
        self._cleanup.close()
        self._engine.close()
        if self._counts is not None:
            self._counts.close()


class ChunkQueue:
    """A queue of chunks from the engine's thread to one coroutine, which is woken rarely."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._chunks: deque[Chunk] = deque()
        self._arrived = asyncio.Event()
        self._waiting = False

    def put(self, chunk: Chunk) -> None:
        """Add a chunk, on any thread."""
        self._chunks.append(chunk)
        if self._waiting or chunk.finish_reason is not None:
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def take(self) -> list[Chunk]:
        """Return all chunks that have come, one at least."""
        # First said, then looked: a chunk that comes in between wakes us.
        self._waiting = True
        while not self._chunks:
            await self._arrived.wait()
            self._arrived.clear()
        self._waiting = False
        taken = []
        while self._chunks:
            taken.append(self._chunks.popleft())
        return taken

    async def gather(self, seconds: float | None) -> None:
        """Waits so long (None: as long as it takes), or until the last chunk has come."""
        try:
            async with asyncio.timeout(seconds):
                await self._arrived.wait()
        except TimeoutError:
            pass


def merge_chunks(chunks: Sequence[Chunk]) -> Chunk:
    """Return what several steps brought, as if it were one."""
    if len(chunks) == 1:
        return chunks[0]
    reason: FinishReason | None = chunks[-1].finish_reason
    return Chunk(
        "".join(chunk.text for chunk in chunks),
        tuple(token for chunk in chunks for token in chunk.token_ids),
        tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
        reason,
        chunks[-1].error,
    )
