"""Choose the engine replica for a request: one that holds its adapter, unless that one is busy."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.request_router import RequestRouter

ADAPTER = "adapter"
"""Keyword under which a call names the adapter version that it needs; None is the base model."""

RESIDENT, STATS = "resident", "stats"
"""What a replica tells of itself: the adapters in its slots and their bytes, and its engine's
counts."""


@dataclass(frozen=True)
class ReplicaState:
    """A replica that a request may go to."""

    name: str
    load: int
    """Requests that it works on or keeps waiting."""
    holds: bool
    """The request's adapter is in one of its slots."""


def rank(
    replicas: Iterable[ReplicaState], adapter: str | None, *, loading: float, capacity: int
) -> list[ReplicaState]:
    """Return the replicas, the best first; those with `capacity` requests are full, and come last.

    Fetching an adapter costs as much as `loading` requests that are ahead: a request goes where
    its adapter is until that replica has so many more to do than another. The other one then
    holds it too, and a hot adapter comes to use all replicas. Among equals each adapter has an
    order of its own (rendezvous hashing, Thaler & Ravishankar 1998), which every router knows.
    """

    def cost(replica: ReplicaState) -> tuple[bool, float, bytes]:
        absent = adapter is not None and not replica.holds
        tie = blake2b(f"{adapter}/{replica.name}".encode(), digest_size=8).digest()
        return replica.load >= capacity, replica.load + loading * absent, tie

    return sorted(replicas, key=cost)


class RecentAdapters:
    """The adapters that each replica was asked for last, as many as it has slots for.

    A replica tells which ones it holds every second or so; this knows in between.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._asked: dict[Any, OrderedDict[str, None]] = {}

    def note(self, replica: Any, adapter: str) -> None:
        asked = self._asked.setdefault(replica, OrderedDict())
        asked[adapter] = None
        asked.move_to_end(adapter)
        if len(asked) > self._slots:
            asked.popitem(last=False)

    def has(self, replica: Any, adapter: str) -> bool:
        return adapter in self._asked.get(replica, ())

    def keep(self, replicas: Iterable[Any]) -> None:
        """Forgets all other replicas."""
        kept = set(replicas)
        self._asked = {replica: asked for replica, asked in self._asked.items() if replica in kept}


_routers: weakref.WeakSet[RequestRouter] = weakref.WeakSet()


def register_router(router: RequestRouter) -> None:
    """Let `replica_reports` know from now on what this router of the process knows."""
    _routers.add(router)


def replica_reports() -> dict[str, Mapping[str, Any]]:
    """Return what each replica that the process can reach last told of itself, by its name."""
    return {
        replica.replica_id.unique_id: replica.routing_stats or {}
        for router in list(_routers)
        for replica in list(router.curr_replicas.values())
    }
