"""`Dispatcher`: the open requests of one ingress: routes them, hears of their tokens, ends them. No HTTP, no Ray.

Each HTTP call opens an `OpenCall` with its requests; outputs arrive from the replicas' streams, one message per step,
and are handed to the calls they belong to: the first and the last of a call at once, those between at a `WritePace`
that leaves the cores to the engine. When a replica is lost, every request open there ends with an
`EngineDeadError`; `_on_lost_request` is where continuing it elsewhere will go.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cluster.open_call import CallWatcher, OpenCall
from cluster.replica_report import Answer, Question
from cluster.replica_stream import ReplicaStream, ReplicaTransport
from cluster.routing_policy import RoutingPolicy
from cluster.step_message import Hello, MetricsTarget, StepMessage, unpack
from cluster.write_pace import WritePace
from engine import EngineDeadError, FinishReason, NanoserveError, Request, RequestError, RequestId


class NoReplicaError(NanoserveError):
    """No replica is ready to take requests now."""


class ReplicaEvent(StrEnum):
    """What became of a replica, as an ingress sees it; the values are labels of a metric."""

    JOINED = "joined"  # it can be sent requests
    LOST = "lost"  # it died, or the way to it did
    LEFT = "left"  # Serve took it out of service, as when scaling down


@dataclass(slots=True)
class _OpenRequest:
    replica_id: str
    call: OpenCall


class Dispatcher:
    """Requests of one ingress on their way through the replicas. Use it from one event loop."""

    def __init__(
        self,
        policy: RoutingPolicy,
        connect: Callable[[str], ReplicaTransport],
        metrics: MetricsTarget,
        on_routed: Callable[[str, int], None] = lambda replica_id, cached_tokens: None,
        pace: WritePace | None = None,
        on_replica: Callable[[ReplicaEvent], None] = lambda event: None,
        on_gone: Callable[[str], None] = lambda replica_id: None,
    ) -> None:
        """`on_gone` hears of each replica that Serve has taken from its list: nothing will be sent there again."""
        self._policy = policy
        self._connect = connect
        self._metrics = metrics
        self._on_routed = on_routed
        self._pace = pace or WritePace()
        self._on_replica = on_replica
        self._on_gone = on_gone
        self._streams: dict[str, ReplicaStream] = {}
        self._draining: dict[str, ReplicaStream] = {}
        self._open: dict[RequestId, _OpenRequest] = {}
        self._targets: dict[str, MetricsTarget] = {metrics.process_id: metrics}
        self._ingresses_of: dict[str, tuple[MetricsTarget, ...]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def is_ready(self) -> bool:
        """Whether a request would find a replica."""
        return bool(self._policy.replica_ids)

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    @property
    def process_id(self) -> str:
        """Of this ingress."""
        return self._metrics.process_id

    @property
    def busiest(self) -> str | None:
        """The replica with the most work before it; None where none is ready."""
        loads = self._policy.loads()
        return max(loads, key=lambda replica_id: loads[replica_id][::-1], default=None)

    @property
    def connected(self) -> dict[str, bool]:
        """The replicas that run, and whether each has said hello, so that requests may go there."""
        ready = set(self._policy.replica_ids)
        return {replica_id: replica_id in ready for replica_id in self._streams}

    @property
    def draining(self) -> list[str]:
        """Replicas that finish what they have, and get nothing more."""
        return list(self._draining)

    async def ask(self, replica_id: str, question: Question, seconds: float) -> Answer | None:
        """What a replica answers; None where it does not within `seconds`."""
        stream = self._streams.get(replica_id) or self._draining.get(replica_id)
        if stream is None:
            return None
        try:
            async with asyncio.timeout(seconds):
                return await stream.ask(question)
        except (OSError, NanoserveError):  # TimeoutError is an OSError
            return None

    @property
    def metrics_targets(self) -> list[MetricsTarget]:
        """Every /metrics endpoint known: this process, the replicas, and the other ingresses they serve."""
        targets = dict(self._targets)
        for ingresses in self._ingresses_of.values():
            targets |= {target.process_id: target for target in ingresses}
        return sorted(targets.values(), key=lambda target: (target.kind, target.process_id))

    def open(self, requests: Sequence[Request], watcher: CallWatcher | None = None) -> OpenCall:
        """Send the requests of one call on their way; raises `NoReplicaError` and then has sent none."""
        if not self.is_ready:
            raise NoReplicaError("No replica is ready.")
        call = OpenCall(self.abort, [request.request_id for request in requests], watcher)
        for request in requests:
            self._send(request, call)
        return call

    def abort(self, request_ids: Iterable[RequestId], reason: FinishReason = FinishReason.ABORT) -> None:
        """End requests now; those that have ended are ignored. `reason` is STOP for a stop string."""
        for request_id in request_ids:
            ended = self._end(request_id, is_complete=reason is FinishReason.STOP)
            if ended is None:
                continue
            stream = self._streams.get(ended.replica_id) or self._draining.get(ended.replica_id)
            if stream is not None:  # else it was the last of a replica that left, which ends it with the stream
                stream.abort(request_id, reason)

    def set_replicas(self, replica_ids: frozenset[str]) -> None:
        """The replicas that run now. One that left finishes what it has, then its stream is closed."""
        for replica_id in replica_ids - self._streams.keys():
            stream = ReplicaStream(replica_id, self._connect(replica_id), self, self._metrics.process_id, self._metrics)
            self._streams[replica_id] = stream
        for replica_id in self._streams.keys() - replica_ids:
            self._forget(replica_id, ReplicaEvent.LEFT)
            self._draining[replica_id] = self._streams.pop(replica_id)
            self._close_if_drained(replica_id)
            self._on_gone(replica_id)

    async def close(self) -> None:
        """End every stream and every open request."""
        for request_id in list(self._open):
            self._on_lost_request(request_id, EngineDeadError("The server is shutting down."))
        streams = [*self._streams.values(), *self._draining.values()]
        self._streams.clear()
        self._draining.clear()
        await asyncio.gather(*[stream.close() for stream in streams], *self._closing)

    def on_hello(self, hello: Hello) -> None:
        """A replica is ready; one that has left meanwhile gets nothing more to do."""
        if hello.replica_id not in self._streams:
            return
        self._targets[hello.replica_id] = hello.metrics
        self._policy.add_replica(hello.replica_id, capacity_tokens=hello.capacity_tokens, block_size=hello.block_size)
        self._on_replica(ReplicaEvent.JOINED)

    def on_message(self, replica_id: str, message: StepMessage) -> None:
        """What one step produced, for all calls."""
        self._policy.observe(replica_id, message.load)
        if message.ingresses is not None and replica_id in self._streams:  # else nobody would forget them
            self._ingresses_of[replica_id] = message.ingresses
        touched: set[OpenCall] = set()
        for output in unpack(message.outputs):
            open_request = self._open.get(output.request_id)
            if open_request is None or open_request.replica_id != replica_id:
                continue  # aborted here while its tokens were on their way
            self._policy.produced(output.request_id, output.token_ids)
            if output.finish_reason is not None:
                self._end(output.request_id, is_complete=True)
            call = open_request.call
            if not call.has_begun:
                call.begin()
            call.outputs.append(output)
            touched.add(call)
        if touched:
            self._pace.arrived(touched, len(self._open))

    def on_rejected(self, request_id: RequestId, error: RequestError) -> None:
        """The engine will never run this request."""
        ended = self._end(request_id, is_complete=False)
        if ended is not None:
            ended.call.fail(error)

    def on_lost(self, replica_id: str, error: EngineDeadError) -> None:
        """A replica, or the way to it, is gone; also told of every attempt to reach it again."""
        self._forget(replica_id, ReplicaEvent.LOST)
        for request_id in [key for key, value in self._open.items() if value.replica_id == replica_id]:
            self._on_lost_request(request_id, error)
        self._close_if_drained(replica_id)

    def _send(self, request: Request, call: OpenCall) -> None:
        decision = self._policy.route(request)
        assert decision is not None, "checked by the caller"
        self._open[request.request_id] = _OpenRequest(decision.replica_id, call)
        self._on_routed(decision.replica_id, decision.num_cached_tokens)
        if call.watcher is not None:
            request = call.watcher.dispatched(request, decision.replica_id, decision.num_cached_tokens)
        self._streams[decision.replica_id].submit(request)

    def _on_lost_request(self, request_id: RequestId, error: EngineDeadError) -> None:
        ended = self._end(request_id, is_complete=False)
        if ended is not None:
            ended.call.fail(error)

    def _end(self, request_id: RequestId, *, is_complete: bool) -> _OpenRequest | None:
        open_request = self._open.pop(request_id, None)
        if open_request is not None:
            self._policy.finish(request_id, is_complete=is_complete)
            open_request.call.ended(request_id)
            self._close_if_drained(open_request.replica_id)
        return open_request

    def _forget(self, replica_id: str, event: ReplicaEvent) -> None:
        if replica_id in self._policy.replica_ids:
            self._on_replica(event)
        self._policy.remove_replica(replica_id)
        self._targets.pop(replica_id, None)
        self._ingresses_of.pop(replica_id, None)

    def _close_if_drained(self, replica_id: str) -> None:
        if replica_id not in self._draining:
            return
        if any(open_request.replica_id == replica_id for open_request in self._open.values()):
            return
        task = asyncio.create_task(self._draining.pop(replica_id).close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
