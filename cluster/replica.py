"""`Replica`: the Serve deployment around one `EngineHost`, and `ServeTransport`, the ingress's way to call it.

The replica's process holds the control plane; its ranks are actors in its own placement group. A thin shell: it
wires Ray's context to the parts that know no Ray, and nothing else.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

import ray
from prometheus_client import CollectorRegistry
from ray import serve
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ServingConfig
from cluster.engine_host import EngineHost
from cluster.loopback import bind_replica_server_to_node, node_address
from cluster.memory_metrics import MemoryCollector
from cluster.metrics import EngineCollector, MetricsEndpoint
from cluster.placement import Placement
from cluster.process_log import log_to_standard_error, log_with_serve
from cluster.rank_metrics import RankCollector
from cluster.replica_report import Answer, Question
from cluster.request_trace import RequestTrace
from cluster.router import TARGET
from cluster.startup import StartupReport
from cluster.step_door import Invitation, StepDoor
from cluster.step_link import StepLink
from cluster.step_message import PROTOCOL_PICKLE, Abort, Hello, MetricsTarget, RequestProblem, StepMessage
from cluster.tracing import Tracing
from cluster.worker_group import WorkerGroup
from engine import ConfigError, DeviceKind, EngineDeadError, LLMEngine, MemoryMeter, MemoryPart, Request

DEPLOYMENT = "Replica"


class Replica:
    """One engine group. Serve makes it, asks for its health, and replaces it when the engine has died."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: ServingConfig, device: DeviceKind, placement: Placement
    ) -> None:
        bind_replica_server_to_node()
        self.replica_id: str = serve.get_replica_context().replica_id.unique_id
        log_with_serve()
        self._report = report = StartupReport(self.replica_id)
        meter = MemoryMeter()
        try:
            engine_config = config.engine_config(device, placement.threads_per_rank)
            self._tracing = Tracing.open(config.tracing, "replica", self.replica_id)
            log = partial(log_to_standard_error, config.logs, self.replica_id)
            group = WorkerGroup(engine_config, _rank_options(placement), report.progress, report.doing, log)
            trace = RequestTrace(self._tracing.tracer, config.names[0], self.replica_id)
            engine = LLMEngine(engine_config, group, trace.finished)
            capacity = await engine.start()
        except (ConfigError, EngineDeadError) as error:
            report.failed(error)
            raise
        registry = CollectorRegistry()
        self._endpoint = MetricsEndpoint(registry, node_address())
        target = MetricsTarget("replica", self.replica_id, self._endpoint.address)
        self._host = EngineHost(engine, capacity, target, group)
        self._door = await StepDoor.open(self._host, node_address())
        registry.register(
            EngineCollector(
                self._host.stats,
                model=config.names[0],
                replica=self.replica_id,
                recent=self._host.recent_losses,
            )
        )
        registry.register(RankCollector(group.meters, model=config.names[0], replica=self.replica_id))
        own = meter.use("replica", os.getpid(), {MemoryPart.CONTROL: meter.grown()})
        memory = (*([own] if own else []), *group.memory)
        registry.register(MemoryCollector(memory, model=config.names[0], replica=self.replica_id))
        report.ready(time.time(), memory)

    async def outputs(self, ingress_id: str, metrics: MetricsTarget, *, replica_id: str) -> AsyncIterator[Invitation]:
        """Invite an ingress to the `StepDoor`. The stream says nothing more, and lasts as long as the connection.

        So Serve, which ends neither replicas nor ingresses while they call each other, knows that they do. Raises
        `EngineDeadError` where the engine has died: nobody shall route to it.
        """
        assert replica_id == self.replica_id, "the router sent a call to the wrong replica"
        self._host.check()
        async with self._door.invited(ingress_id, metrics) as guest:
            yield guest.invitation
            await guest.gone.wait()

    def check_health(self) -> None:
        """Serve's hook: raises when this replica must be replaced."""
        try:
            self._host.check()
        except EngineDeadError:
            self._report.lost()  # before Serve begins with another in its place
            raise

    async def __del__(self) -> None:
        """Serve's hook at the end of a replica that was drained."""
        if hasattr(self, "_host"):
            self._endpoint.close()
            self._door.close()
            with contextlib.suppress(EngineDeadError):  # the report of one that was lost stays, to be counted
                self._host.check()
                self._report.withdraw()
            await self._host.close()
            await asyncio.to_thread(self._tracing.close)


class ServeTransport:
    """`ReplicaTransport` over a `StepLink`; the invitation comes by a call that Serve routes to the replica named."""

    def __init__(self, handle: Any, replica_id: str) -> None:
        self._target = {TARGET: replica_id}
        self._outputs = handle.options(method_name="outputs", stream=True, **PROTOCOL_PICKLE)
        self._link: StepLink | None = None

    async def outputs(self, ingress_id: str, metrics: MetricsTarget) -> AsyncGenerator[Hello | StepMessage, None]:
        """See `ReplicaTransport`."""
        invitations = self._outputs.remote(ingress_id, metrics, **self._target)
        try:
            async with StepLink.connected(await anext(invitations)) as link, aclosing(link.messages()) as messages:
                self._link = link
                async for message in messages:
                    yield message
        finally:
            self._link = None
            invitations.cancel()

    async def submit(
        self, ingress_id: str, requests: list[Request], aborted: list[Abort]
    ) -> list[RequestProblem | None]:
        """See `ReplicaTransport`."""
        if self._link is None:
            raise ConnectionResetError("There is no connection to the replica.")
        return await self._link.submit(requests, aborted)

    async def ask(self, question: Question) -> Answer:
        """See `ReplicaTransport`."""
        if self._link is None:
            raise ConnectionResetError("There is no connection to the replica.")
        return await self._link.ask(question)


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
