"""Two tiers of adapters, host memory and slots, which the least recently used ones leave."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rayfin.serving.engine.adapter_reads import adapter_reads, reading
from rayfin.serving.engine.request import AdapterSource

if TYPE_CHECKING:
    from rayfin.serving.engine.host_adapter import HostAdapter
    from rayfin.serving.engine.model import BatchedModel


class HostCache:
    """A cache of adapters in host memory, read from disk by threads of its own; thread-safe.

    The least recently used leave when there are more than `limit_bytes`. A load that fails leaves
    nothing behind, and the next one tries anew; what comes too late for those who asked is kept for
    those who ask again.
    """

    def __init__(
        self,
        read: Callable[[AdapterSource], HostAdapter],
        limit_bytes: int,
        on_ready: Callable[[], None],
        load_seconds: float,
    ) -> None:
        """`on_ready` is called, on any thread, whenever a load has ended, or was given up
        `load_seconds` after it was asked for.
        """
        self._read, self._limit, self._on_ready = read, limit_bytes, on_ready
        self._lock = threading.Lock()
        self._held: OrderedDict[str, HostAdapter] = OrderedDict()
        self._loading: dict[str, Future[HostAdapter]] = {}
        self._gone: set[str] = set()
        """Versions that were removed while they were read; no other ever has their numbers."""
        self._calls = adapter_reads(load_seconds)
        self.bytes = 0
        self.loads = 0
        """Adapters read from disk so far."""

    def load(self, source: AdapterSource) -> Future[HostAdapter]:
        """Return the future of the adapter, which raises AdapterError, or Unavailable where the
        storage is away or takes too long.
        """
        with self._lock:
            if (adapter := self._held.get(source.ref)) is not None:
                self._held.move_to_end(source.ref)
                done: Future[HostAdapter] = Future()
                done.set_result(adapter)
                return done
            if (running := self._loading.get(source.ref)) is not None:
                return running
            self._gone.discard(source.ref)
            future = self._calls.submit(
                f"adapter '{source.ref}' is being read",
                partial(self._load, source),
                partial(self._keep, source.ref),
            )
            self._loading[source.ref] = future
        # Outside the lock: a future that is done already calls back at once.
        future.add_done_callback(lambda _: self._ended(source.ref))
        return future

    def holds(self, ref: str) -> bool:
        """Returns whether a load of it would take no read."""
        with self._lock:
            return ref in self._held

    def forget(self, ref: str) -> None:
        with self._lock:
            if ref in self._loading:
                self._gone.add(ref)
            if (adapter := self._held.pop(ref, None)) is not None:
                self.bytes -= adapter.nbytes

    def close(self) -> None:
        self._calls.close()

    @property
    def health_problem(self) -> str | None:
        """Return why nothing more can be read; None where it can."""
        return self._calls.health_problem

    @property
    def stuck(self) -> int:
        """Reads that were given up, and have not come back."""
        return self._calls.stuck

    def _load(self, source: AdapterSource) -> HostAdapter:
        with reading(source.ref):
            return self._read(source)

    def _keep(self, ref: str, adapter: HostAdapter) -> None:
        with self._lock:
            self.loads += 1
            if ref in self._gone or adapter.nbytes > self._limit:
                return  # for those who wait for it, and no one else
            self._held[ref] = adapter
            self.bytes += adapter.nbytes
            while self.bytes > self._limit:
                _, gone = self._held.popitem(last=False)
                self.bytes -= gone.nbytes

    def _ended(self, ref: str) -> None:
        with self._lock:
            self._loading.pop(ref, None)
        self._on_ready()


@dataclass
class _Slot:
    index: int
    nbytes: int
    table_bytes: int
    pins: int = 0


class SlotCache:
    """Assigns slots to adapters, and counts the rows that use them; for one thread only.

    A slot is taken from the least recently used adapter that no row uses. Output heads and
    embeddings of the adapters' own are beside the slots, in `most_table_bytes` at most: for one
    that brings some, others that do so leave.
    """

    def __init__(self, count: int, model: BatchedModel, most_table_bytes: int) -> None:
        self._model, self._most_table_bytes = model, most_table_bytes
        self._free = list(range(count, 0, -1))
        self._held: OrderedDict[str, _Slot] = OrderedDict()
        self.hits = self.fills = self.evictions = 0
        self.table_bytes = 0
        self.resident: dict[str, int] = {}
        """Adapters in slots, the most recently used first, and their bytes; never changed, only
        replaced: any thread may look."""

    def holds(self, ref: str) -> bool:
        return ref in self._held

    def may_acquire(self, ref: str, adapter: HostAdapter | None) -> bool:
        """Return whether `acquire` would find a slot, and room."""
        if ref in self._held:
            return True
        assert adapter is not None
        pinned = [slot for slot in self._held.values() if slot.pins]
        if not self._free and len(pinned) == len(self._held):
            return False
        need = self._model.table_bytes(adapter)
        pinned_bytes = sum(slot.table_bytes for slot in pinned)
        return not need or need + pinned_bytes <= self._most_table_bytes

    def acquire(self, ref: str, adapter: HostAdapter | None) -> int:
        """Return the slot that holds the adapter, pinned until `release`; `may_acquire` must hold.

        `adapter` may be None where the slot holds it already.
        """
        if (slot := self._held.get(ref)) is None:
            assert adapter is not None
            need = self._model.table_bytes(adapter)
            while need and self.table_bytes + need > self._most_table_bytes:
                self._evict(with_tables=True)
            if not self._free:
                self._evict()
            slot = _Slot(self._free.pop(), adapter.nbytes, need)
            try:
                self._model.fill(slot.index, adapter)
            except BaseException:
                # Whoever had the slot before is gone from it all the same.
                self._free.append(slot.index)
                self._tell()
                raise
            self.fills += 1
            self._held[ref] = slot
            self.table_bytes += need
        else:
            self.hits += 1
        self._held.move_to_end(ref)
        self._tell()
        slot.pins += 1
        return slot.index

    def release(self, ref: str) -> None:
        self._held[ref].pins -= 1

    def forget(self, ref: str) -> bool:
        """Frees the slot of an adapter; False while a row uses it, which keeps it."""
        slot = self._held.get(ref)
        if slot is not None and slot.pins:
            return False
        if slot is not None:
            self._empty(ref)
            self._tell()
        return True

    def _tell(self) -> None:
        self.resident = {ref: slot.nbytes for ref, slot in reversed(self._held.items())}

    def _evict(self, *, with_tables: bool = False) -> None:
        """Frees the slot of the least recently used adapter that no row uses."""
        left = (
            ref
            for ref, slot in self._held.items()
            if not slot.pins and (slot.table_bytes or not with_tables)
        )
        self._empty(next(left))
        self.evictions += 1

    def _empty(self, ref: str) -> None:
        slot = self._held.pop(ref)
        self.table_bytes -= slot.table_bytes
        # Now: nobody may want this slot for long, and tables are what takes memory.
        self._model.forget(slot.index)
        self._free.append(slot.index)
