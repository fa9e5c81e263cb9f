"""Let an engine replica drop versions that were removed, and requests whose callers are gone."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

from ray.util import list_named_actors

from rayfin.adapters import AdapterRef, Catalog
from rayfin.errors import AdapterError, StorageError
from rayfin.serving.engine.request import AdapterSource, Request
from rayfin.serving.timed_executor import TimedExecutor

if TYPE_CHECKING:
    from rayfin.serving.engine.engine import Engine
    from rayfin.serving.engine.vllm import VllmEngine

log = logging.getLogger(__name__)

_PERIOD = 1.0
_CLOSING_SECONDS = 5.0
_READ_SECONDS = 10.0
"""Time for reading the registry; a disk that takes longer is as good as away."""


class ReplicaCleanup:
    """Looks at the registry and at the callers every second, on a thread of its own."""

    def __init__(self, engine: Engine | VllmEngine, catalog: Catalog) -> None:
        self._engine, self._catalog = engine, catalog
        self._away = False
        self._reads = TimedExecutor("cleanup", threads=1, seconds=_READ_SECONDS, most_stuck=4)
        self._reading: Future[None] | None = None
        self._known: set[str] = set()
        self._callers: dict[str, str] = {}
        """Request id -> name of the actor that asked."""
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cleanup", daemon=True)
        self._thread.start()

    def know(self, source: AdapterSource) -> None:
        """Note that the engine may hold this version."""
        with self._lock:
            self._known.add(source.ref)

    def begun(self, request: Request, caller: str | None) -> None:
        if request.adapter is not None:
            self.know(request.adapter)
        if caller is not None:
            with self._lock:
                self._callers[request.request_id] = caller

    def ended(self, request: Request) -> None:
        with self._lock:
            self._callers.pop(request.request_id, None)

    def close(self) -> None:
        """End the checks; waits only a moment for one that hangs on Ray's head."""
        self._stop.set()
        self._reads.close()
        self._thread.join(_CLOSING_SECONDS)

    def check(self) -> None:
        """Check the callers, and begin a check of the registry unless one goes on."""
        with self._lock:
            callers = dict(self._callers)
        if callers:
            alive = {actor["name"] for actor in list_named_actors(all_namespaces=True)}
            for request_id, caller in callers.items():
                if caller not in alive:  # it can't close its calls any more
                    self._engine.cancel(request_id)
        if self._reading is None or self._reading.done():
            # On another thread: a disk that stalls keeps no dead caller's request at work.
            what = "the registry is being looked at"
            self._reading = self._reads.submit(what, self._check_registry)

    def _check_registry(self) -> None:
        try:
            self._forget_removed()
        except Exception:  # nobody reads the result; the next check may do
            log.exception("the registry could not be looked at")

    def _forget_removed(self) -> None:
        with self._lock:
            known = set(self._known)
        for ref in known:
            if self._is_removed(ref):
                self._engine.forget(ref)
                with self._lock:
                    self._known.discard(ref)

    def _is_removed(self, ref: str) -> bool:
        parsed = AdapterRef.parse(ref)
        try:
            removed = parsed.version not in self._catalog.versions(parsed.name)
        except (AdapterError, StorageError) as error:
            if not self._away:
                log.warning("the registry can't be read: %s", error)
            self._away = True
            return False
        self._away = False
        return removed

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD):
            try:
                self.check()
            except Exception:  # a cluster that does not answer now; at the next check it may
                log.exception("the registry and the callers could not be looked at")
