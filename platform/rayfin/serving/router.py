"""Serve's request router for engine replicas.

Serve copies this module into each process by value, so that what it imports is shared with the
rest of the process, and variables of its own would not be.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from rayfin.serving.routing import (
    ADAPTER,
    RESIDENT,
    RecentAdapters,
    ReplicaState,
    rank,
    register_router,
)

_EARLY = 1024


class AdapterRouter(RequestRouter):
    """Serve's router for the engine deployment; one in each process that has a handle.

    Replicas take all that comes (their engines refuse what is too much), so that no request waits
    here for another.
    """

    def initialize_state(  # type: ignore[override]
        self, *, slots: int, loading: float, capacity: int
    ) -> None:
        """Prepare for engines of `slots` slots each; `loading` and `capacity` are as in `rank`."""
        self._rank = partial(rank, loading=loading, capacity=capacity)
        self._recent = RecentAdapters(slots)
        self._sent: dict[ReplicaID, set[str]] = {}
        self._early: OrderedDict[str, bool] = OrderedDict()
        """Requests that have ended, and of whose beginning nothing is known yet."""
        register_router(self)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return each replica by itself, the best first."""
        adapter = None if pending_request is None else pending_request.kwargs.get(ADAPTER)
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        places = [self._place(replica, adapter) for replica in candidate_replicas]
        ranked = [replicas[place.name] for place in self._rank(places, adapter)]
        if adapter is not None and ranked:
            # At once: the next request for it is on its way before this one has arrived.
            self._recent.note(ranked[0].replica_id, adapter)
        return [[replica] for replica in ranked]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        request = pending_request.metadata.internal_request_id
        if self._early.pop(request, False):
            return
        self._sent.setdefault(replica_id, set()).add(request)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        sent = self._sent.get(replica_id, set())
        if internal_request_id in sent:
            sent.discard(internal_request_id)
            return
        # A request that was refused at once may end before Serve says that it was routed.
        self._early[internal_request_id] = True
        if len(self._early) > _EARLY:
            self._early.popitem(last=False)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        known = {replica.replica_id for replica in replicas}
        self._recent.keep(known)
        self._sent = {replica: sent for replica, sent in self._sent.items() if replica in known}
        super().update_replicas(replicas)

    def _place(self, replica: RunningReplica, adapter: str | None) -> ReplicaState:
        identity = replica.replica_id
        # Serve's own count knows of other processes' requests too, but forgets after a while.
        counted = self.replica_queue_len_cache.get(identity) or 0
        holds = adapter is not None and (
            adapter in (replica.routing_stats or {}).get(RESIDENT, ())
            or self._recent.has(identity, adapter)
        )
        return ReplicaState(
            identity.unique_id, max(counted, len(self._sent.get(identity, ()))), holds
        )
