"""`Replica`: the Serve deployment around one `EngineHost`, and `ServeTransport`, the ingress's way to call it.

The replica's process holds the control plane; its ranks are actors in its own placement group. A thin shell: it
wires Ray's context to the parts that know no Ray, and nothing else.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from typing import Any

import ray
from prometheus_client import CollectorRegistry
from ray import serve
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ServingConfig
from cluster.engine_host import EngineHost
from cluster.loopback import bind_replica_server_to_node, node_address
from cluster.metrics import EngineCollector, MetricsEndpoint
from cluster.placement import Placement
from cluster.router import TARGET
from cluster.startup import StartupReport
from cluster.step_message import PROTOCOL_PICKLE, Abort, Hello, MetricsTarget, RequestProblem, StepMessage
from cluster.worker_group import WorkerGroup
from engine import ConfigError, DeviceKind, EngineDeadError, LLMEngine, Request

DEPLOYMENT = "Replica"


class Replica:
    """One engine group. Serve makes it, asks for its health, and replaces it when the engine has died."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: ServingConfig, device: DeviceKind, placement: Placement
    ) -> None:
        bind_replica_server_to_node()
        self.replica_id: str = serve.get_replica_context().replica_id.unique_id
        report = StartupReport(self.replica_id)
        try:
            engine_config = config.engine_config(device, placement.threads_per_rank)
            group = WorkerGroup(engine_config, _rank_options(placement), report.progress)
            engine = LLMEngine(engine_config, group)
            capacity = await engine.start()
        except (ConfigError, EngineDeadError) as error:
            report.failed(error)
            raise
        registry = CollectorRegistry()
        self._endpoint = MetricsEndpoint(registry, node_address())
        target = MetricsTarget("replica", self.replica_id, self._endpoint.address)
        self._host = EngineHost(engine, capacity, target, group)
        registry.register(
            EngineCollector(
                self._host.stats,
                model=config.names[0],
                replica=self.replica_id,
                recent=self._host.recent_losses,
            )
        )
        report.ready(time.time())

    async def submit(
        self,
        ingress_id: str,
        requests: Sequence[Request],
        aborted: Iterable[Abort],
        *,
        replica_id: str,
    ) -> list[RequestProblem | None]:
        """See `EngineHost.submit`."""
        assert replica_id == self.replica_id, "the router sent a call to the wrong replica"
        return self._host.submit(ingress_id, requests, aborted)

    async def outputs(
        self, ingress_id: str, metrics: MetricsTarget, *, replica_id: str
    ) -> AsyncIterator[Hello | StepMessage]:
        """See `EngineHost.outputs`."""
        assert replica_id == self.replica_id, "the router sent a call to the wrong replica"
        async with aclosing(self._host.outputs(ingress_id, metrics)) as messages:
            async for message in messages:
                yield message

    def check_health(self) -> None:
        """Serve's hook: raises when this replica must be replaced."""
        self._host.check()

    async def __del__(self) -> None:
        """Serve's hook at the end of a replica that was drained."""
        if hasattr(self, "_host"):
            self._endpoint.close()
            await self._host.close()


class ServeTransport:
    """`ReplicaTransport` through a Serve handle whose router honours the replica named in the call."""

    def __init__(self, handle: Any, replica_id: str) -> None:
        self._target = {TARGET: replica_id}
        self._submit = handle.options(method_name="submit", **PROTOCOL_PICKLE)
        self._outputs = handle.options(method_name="outputs", stream=True, **PROTOCOL_PICKLE)

    async def outputs(self, ingress_id: str, metrics: MetricsTarget) -> AsyncGenerator[Hello | StepMessage, None]:
        """See `ReplicaTransport`."""
        messages = self._outputs.remote(ingress_id, metrics, **self._target)
        try:
            async for message in messages:
                yield message
        finally:
            messages.cancel()

    async def submit(
        self, ingress_id: str, requests: list[Request], aborted: list[Abort]
    ) -> list[RequestProblem | None]:
        """See `ReplicaTransport`."""
        problems: list[RequestProblem | None] = await self._submit.remote(ingress_id, requests, aborted, **self._target)
        return problems


def _rank_options(placement: Placement) -> list[dict[str, Any]]:
    group = ray.util.get_current_placement_group()
    assert group is not None, "the deployment was given a placement group"
    return [
        {
            "num_cpus": placement.rank_cpus,
            "num_gpus": placement.rank_gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=1 + rank),
        }
        for rank in range(placement.tensor_parallel)
    ]
