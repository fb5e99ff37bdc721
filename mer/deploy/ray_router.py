"""What Ray Serve asks of mer: to which engine a request goes, and how many engines there should be."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import RequestRouter

from mer.deploy.affinity import Affinity


class AffinityRouter(RequestRouter):
    """Of a call with `keys` (see `beginnings`) the engine that knows most of them comes first."""

    def initialize_state(self) -> None:
        """Called once, by Ray."""
        self._affinity = Affinity()

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """Ranks of one engine each, best first; Ray takes the first that is free."""
        if pending_request is not None:  # where none is free: otherwise Ray asks again at once, without end
            pending_request.routing_context.should_backoff = True
        there = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        cache = self.replica_queue_len_cache
        loads = {name: cache.get(replica.replica_id) or 0 for name, replica in there.items()}
        return [[there[name]] for name in self._affinity.order(_keys(pending_request), loads)]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """Where it went."""
        self._affinity.sent(_keys(pending_request), replica_id.unique_id)

    def on_replica_actor_died(self, replica_id: Any) -> None:
        """Told by Ray."""
        super().on_replica_actor_died(replica_id)
        self._affinity.gone(replica_id.unique_id)


def _keys(request: Any) -> list[bytes]:
    return list(request.kwargs.get("keys", ())) if request is not None else []
