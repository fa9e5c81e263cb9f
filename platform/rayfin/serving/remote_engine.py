"""An engine in other processes: `ServedEngine` over Serve's handle of the engine replicas."""

from __future__ import annotations

import asyncio
from dataclasses import make_dataclass
from typing import TYPE_CHECKING, Any, cast

import ray

from rayfin.config.serving import ServeConfig
from rayfin.errors import Overloaded, Unavailable
from rayfin.serving.engine.request import Chunk, Request, Sink, check_prompt
from rayfin.serving.engine.request_tasks import RequestTasks
from rayfin.serving.routing import ADAPTER, RESIDENT, STATS, replica_reports

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
    from transformers import PreTrainedTokenizerFast

_GONE = "the engine that worked on this request is gone; send it again"
# Waits before a request is sent again that found a queue full.
_AGAIN = (0.02, 0.1, 0.3)


class RemoteEngine:
    """All engine replicas as one engine; it is made in the event loop that it uses."""

    def __init__(
        self, handle: DeploymentHandle[Any], config: ServeConfig, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        self.tokenizer, self.model_name = tokenizer, config.served_name
        self.max_length = config.engine.max_length
        self._handle = handle
        self._streaming = handle.options(stream=True)
        self._room = config.engine.max_rows + config.engine.max_queue
        self._loop = asyncio.get_running_loop()
        self._me = ray.get_runtime_context().get_actor_name()
        self._requests = RequestTasks(self._loop, self._answer, lambda _: Unavailable(_GONE))
        # Serve's router learns of the replicas with the first call.
        self._first_call = self._loop.create_task(self._find_replicas())

    @property
    def failure(self) -> BaseException | None:
        """Return None while there is a replica."""
        return None if replica_reports() else Unavailable("no engine replica is there")

    def submit(self, request: Request, sink: Sink) -> None:
        """Raises RequestError, Unavailable where there is no replica, or Overloaded where all have
        their queues full.

        A replica may still refuse: then the one chunk that comes says so.
        """
        check_prompt(request, self.max_length, len(self.tokenizer))
        if not (replicas := len(replica_reports())):
            raise Unavailable(
                "no engine replica is ready: it starts or is replaced; try again soon"
            )
        self._requests.submit(request, sink, most=self._room * replicas)

    def cancel(self, request_id: str) -> None:
        self._requests.cancel(request_id)

    def resident(self) -> dict[str, int]:
        """Return the adapters in a slot of any replica."""
        return {
            ref: nbytes
            for replica in replica_reports().values()
            for ref, nbytes in replica.get(RESIDENT, {}).items()
        }

    def stats(self) -> Any:
        """Return the replicas' counts added up, a second old."""
        replicas = replica_reports().values()
        total = {"replicas": len(replicas), "waiting": 0, "running": 0}
        for replica in replicas:
            for name, count in replica.get(STATS, {}).items():
                total[name] = total.get(name, 0) + count
        return make_dataclass("RemoteStats", list(total), frozen=True)(**total)

    def close(self) -> None:
        self._first_call.cancel()

    # --- in the event loop --------------------------------------------------------------------

    async def _find_replicas(self) -> None:
        await self._handle.ping.remote()

    async def _answer(self, request: Request, sink: Sink) -> None:
        """Hand on what a replica sends."""
        last = await self._ask(request, sink)
        for seconds in _AGAIN:
            # This replica's queue was filled by others; there is room somewhere, or was just now.
            if not _is_refused(last):
                break
            await asyncio.sleep(seconds)
            last = await self._ask(request, sink)
        if last is not None and _is_refused(last):
            sink(last)

    async def _ask(self, request: Request, sink: Sink) -> Chunk | None:
        """Return the last chunk that a replica sends; the sink gets all but a refusal for a full
        queue.
        """
        adapter = None if request.adapter is None else request.adapter.ref
        response = cast(
            "DeploymentResponseGenerator[Chunk]",
            self._streaming.generate.remote(request, self._me, **{ADAPTER: adapter}),
        )
        last: Chunk | None = None
        try:
            async for last in response:
                if not _is_refused(last):
                    sink(last)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and not task.cancelling():
                # Not ours: Serve gives up on a replica that it ends so.
                raise Unavailable(_GONE) from error
            response.cancel()
            if last is None or last.finish_reason is None or _is_refused(last):
                raise
        return last


def _is_refused(chunk: Chunk | None) -> bool:
    return chunk is not None and isinstance(chunk.error, Overloaded)
