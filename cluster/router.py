"""`ReplicaRouter`: Serve's `RequestRouter` port. It finds the replicas; `RoutingPolicy` has already chosen one.

The decision, its accounting and the batching of submissions belong together, in the ingress (`cluster.dispatcher`);
so every call names its replica, and this router sends it there or fails it at once, because Serve by itself would
wait for a dead replica for ever. It also tells the ingress of its process, through a `ReplicaBoard`, which replicas
exist: Serve pushes that here within milliseconds of a change.

Serve pickles this module by value: a process's router sees its own copy of whatever is defined here.
"""

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from cluster.replica_board import ReplicaBoard, ReplicaGoneError

TARGET = "replica_id"  # the keyword argument of every call that names its replica


class ReplicaRouter(RequestRouter):
    """Sends each call to the replica that its keyword argument `replica_id` names."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Serve's constructor hook, with the deployment's `request_router_kwargs`: the name of the board."""
        self._board = ReplicaBoard.named(kwargs["board"])

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The named replica alone; a call to one that is gone fails with `ReplicaGoneError`."""
        if pending_request is None:
            return [candidate_replicas]
        target = pending_request.kwargs.get(TARGET)
        chosen = [replica for replica in candidate_replicas if replica.replica_id.unique_id == target]
        if not chosen and not pending_request.future.done():
            pending_request.future.set_exception(ReplicaGoneError(f"Replica {target} is not running."))
        return [chosen or candidate_replicas]  # Serve looks whether the call is settled only when it gets candidates

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's controller says which replicas run."""
        super().update_replicas(replicas)
        self._publish()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A call found its replica dead before the controller did."""
        super().on_replica_actor_died(replica_id)
        self._publish()

    def _publish(self) -> None:
        self._board.publish(frozenset(replica_id.unique_id for replica_id in self.curr_replicas))
