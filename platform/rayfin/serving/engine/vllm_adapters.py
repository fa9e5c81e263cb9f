"""The adapters of a vLLM engine: read and checked by us in bounded time, then loaded by vLLM."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from functools import partial

from rayfin.config.serving import EngineConfig
from rayfin.errors import AdapterError, Unavailable
from rayfin.heartbeat import beat, pause
from rayfin.serving.engine.adapter_reads import adapter_reads, reading
from rayfin.serving.engine.request import AdapterSource
from rayfin.serving.engine.vllm_backend import Lora, VllmBackend

log = logging.getLogger(__name__)

_STEP = "a step of vLLM"


class VllmHeartbeat:
    """Records in the heartbeat of the event loop's thread whether vLLM makes progress."""

    def __init__(self) -> None:
        self._given = 0

    @contextmanager
    def expected(self) -> Iterator[None]:
        """Counts silence of vLLM in the block as a step that takes long."""
        if not self._given:
            beat(_STEP)
        self._given += 1
        try:
            yield
        finally:
            self._given -= 1
            if not self._given:
                pause()

    def made(self) -> None:
        """Records that vLLM has sent something."""
        beat(_STEP)


class VllmAdapters:
    """The adapters that vLLM holds.

    Every version gets a number and a name that no other ever had. `check`, `resident` and
    `health_problem` may be called from any thread, the other methods from the event loop only.
    """

    def __init__(
        self, size: Callable[[AdapterSource], int], config: EngineConfig, progress: VllmHeartbeat
    ) -> None:
        """`size` checks an adapter and returns its size in bytes; it raises AdapterError."""
        self._size, self._config, self._progress = size, config, progress
        self.backend: VllmBackend | None = None
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._known: OrderedDict[str, Lora] = OrderedDict()
        self._uses: Counter[int] = Counter()
        self._calls = adapter_reads(config.load_seconds)
        self._reading: dict[str, Future[int]] = {}
        self._loading: dict[int, asyncio.Task[None]] = {}
        """An adapter's number -> vLLM's loading it, whoever still waits for that."""

    # --- on any thread ------------------------------------------------------------------------

    def check(self, source: AdapterSource) -> None:
        """Raises AdapterError if it can't be served, and Unavailable if it can't be read now."""
        self._read(source).result()

    def resident(self) -> dict[str, int]:
        """Returns the adapters that were used last, one a slot, and their sizes in bytes."""
        with self._lock:
            last = list(self._known.values())[-self._config.slots :]
        return {lora.source.ref: lora.nbytes for lora in reversed(last)}

    @property
    def health_problem(self) -> str | None:
        """Return why no more adapters can be read; None while they can."""
        return self._calls.health_problem

    # --- in the event loop --------------------------------------------------------------------

    @asynccontextmanager
    async def held(self, source: AdapterSource | None) -> AsyncIterator[Lora | None]:
        """Yields the adapter, loaded by vLLM, which keeps it until no request holds it any more.

        Without a `source` it yields None, the base. Raises AdapterError if the adapter can't be
        served, and Unavailable if its storage is away or takes longer than engine.load_seconds.
        """
        if source is None:
            yield None
            return
        lora = await self._get(source)
        self._uses[lora.number] += 1
        try:
            # Now, and not while vLLM computes: there a file that is gone would end its engine.
            await self._load(lora)
            yield lora
        finally:
            self._uses[lora.number] -= 1
            if not self._uses[lora.number]:
                del self._uses[lora.number]
            self._drop_unused(lora)

    def forget(self, ref: str) -> None:
        with self._lock:
            lora = self._known.pop(ref, None)
        if lora is not None:
            self._drop_unused(lora)

    async def close(self) -> None:
        loading = list(self._loading.values())
        for task in loading:
            task.cancel()
        await asyncio.gather(*loading, return_exceptions=True)
        self._calls.close()

    async def _get(self, source: AdapterSource) -> Lora:
        if source.ref not in self._known:
            nbytes = await self._checked(source)
            with self._lock:
                if source.ref not in self._known:  # another request was faster
                    self._known[source.ref] = Lora(next(self._numbers), source, nbytes)
        with self._lock:
            self._known.move_to_end(source.ref)
            return self._known[source.ref]

    async def _load(self, lora: Lora) -> None:
        if (task := self._loading.get(lora.number)) is None:
            task = asyncio.get_running_loop().create_task(self._add(lora))
            self._loading[lora.number] = task
            task.add_done_callback(partial(self._loaded, lora))
        seconds = self._config.load_seconds
        try:
            async with asyncio.timeout(seconds):
                await asyncio.shield(task)
        except TimeoutError as error:
            raise Unavailable(
                f"vLLM is loading adapter '{lora.source.ref}', and that did not end in "
                f"{seconds:g} s; try again later"
            ) from error
        except AdapterError:
            await self._checked(lora.source)  # where it can't be read any more, that is the reason
            raise

    async def _add(self, lora: Lora) -> None:
        assert self.backend is not None
        with self._progress.expected():
            await self.backend.add(lora)
            self._progress.made()

    def _loaded(self, lora: Lora, task: asyncio.Task[None]) -> None:
        del self._loading[lora.number]
        if not task.cancelled():
            task.exception()  # those who waited have it; perhaps all of them have left

    def _drop_unused(self, lora: Lora) -> None:
        if lora.number in self._uses or self._known.get(lora.source.ref) is lora:
            return
        assert self.backend is not None
        task = asyncio.get_running_loop().create_task(self.backend.remove(lora))
        task.add_done_callback(_report)

    # --- reading ------------------------------------------------------------------------------

    async def _checked(self, source: AdapterSource) -> int:
        # Shielded: others wait for it too.
        return await asyncio.shield(asyncio.wrap_future(self._read(source)))

    def _read(self, source: AdapterSource) -> Future[int]:
        """Returns a future of the checked adapter's size; only one thread at a time reads it."""
        with self._lock:
            if (running := self._reading.get(source.ref)) is not None:
                return running
            future = self._calls.submit(
                f"adapter '{source.ref}' is being read", partial(self._sized, source)
            )
            self._reading[source.ref] = future
        # Outside the lock: a future that is done already calls back at once.
        future.add_done_callback(partial(self._ended, source.ref))
        return future

    def _sized(self, source: AdapterSource) -> int:
        with reading(source.ref):
            return self._size(source)

    def _ended(self, ref: str, _: Future[int]) -> None:
        with self._lock:
            self._reading.pop(ref, None)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("an adapter could not be removed from vLLM: %s", error)
