"""Serve's port: calls go to the replica they name, or fail at once; the board hears of every change."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from cluster.replica_board import ReplicaBoard, ReplicaGoneError
from cluster.router import TARGET, ReplicaRouter

DEPLOYMENT = DeploymentID("Replica", "app")


class FakeReplica(SimpleNamespace):
    """As much of Serve's `RunningReplica` as routing needs."""

    def __init__(self, name: str) -> None:
        super().__init__(replica_id=ReplicaID(name, DEPLOYMENT), max_ongoing_requests=1000)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0


@pytest.fixture
def router(request: pytest.FixtureRequest) -> ReplicaRouter:
    made = ReplicaRouter(
        deployment_id=DEPLOYMENT,
        handle_source=DeploymentHandleSource.REPLICA,
        self_actor_id="ingress",
        use_replica_queue_len_cache=True,
    )
    made.initialize_state(board=request.node.name)
    return made


def call(target: str | None) -> PendingRequest:
    metadata = RequestMetadata(request_id="r", internal_request_id=f"i{target}{id(object())}")
    return PendingRequest(args=[], kwargs={} if target is None else {TARGET: target}, metadata=metadata)


async def send(router: ReplicaRouter, pending: PendingRequest) -> Any:
    replica = await asyncio.wait_for(router._choose_replica_for_request(pending), 2)
    return replica.replica_id.unique_id


async def test_a_call_goes_to_the_replica_it_names(router: ReplicaRouter) -> None:
    router.update_replicas([FakeReplica(name) for name in "abc"])  # type: ignore[misc]
    for name in "cabbac":
        assert await send(router, call(name)) == name


async def test_a_call_to_a_replica_that_is_gone_fails_at_once(router: ReplicaRouter) -> None:
    router.update_replicas([FakeReplica("a")])  # type: ignore[list-item]
    with pytest.raises(ReplicaGoneError, match="Replica b is not running"):
        await send(router, call("b"))
    assert await send(router, call("a")) == "a", "and holds up nobody else"
    assert router.curr_num_routing_tasks == 0 or await send(router, call("a")) == "a"


async def test_many_calls_to_the_dead_do_not_starve_the_living(router: ReplicaRouter) -> None:
    router.update_replicas([FakeReplica("a")])  # type: ignore[list-item]
    calls = [send(router, call("b")) for _ in range(50)] + [send(router, call("a"))]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert results[-1] == "a"
    assert all(isinstance(result, ReplicaGoneError) for result in results[:-1])


async def test_a_call_that_names_nobody_goes_anywhere(router: ReplicaRouter) -> None:
    router.update_replicas([FakeReplica("a")])  # type: ignore[list-item]
    with pytest.raises(ReplicaGoneError):
        await send(router, call(None))


async def test_the_board_hears_of_arrivals_and_deaths(router: ReplicaRouter, request: pytest.FixtureRequest) -> None:
    heard: list[frozenset[str]] = []
    ReplicaBoard.named(request.node.name).listen(heard.append)
    router.update_replicas([FakeReplica("a"), FakeReplica("b")])  # type: ignore[list-item]
    router.update_replicas([FakeReplica("a"), FakeReplica("b")])  # type: ignore[list-item]
    router.on_replica_actor_died(ReplicaID("a", DEPLOYMENT))
    assert heard == [frozenset(), frozenset("ab"), frozenset("b")]


def test_a_late_listener_hears_what_is() -> None:
    board = ReplicaBoard()
    board.publish(frozenset("x"))
    heard: list[frozenset[str]] = []
    board.listen(heard.append)
    assert heard == [frozenset("x")]
