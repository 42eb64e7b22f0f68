"""`EngineHost`: one `LLMEngine` and the streams of the ingress processes it serves. Knows asyncio; not Ray or HTTP.

Every ingress holds one long stream of `outputs`; requests come in by `submit`. All outputs of a step for one ingress
are one message; an ingress that is slow gets several steps in one. When a stream ends, for whatever reason, the
requests behind it are aborted, because nobody is left to read them.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Protocol

from cluster.recent_losses import RecentLosses
from cluster.replica_report import Answer, Question, ReplicaReport
from cluster.routing_policy import LoadSnapshot
from cluster.step_message import (
    Abort,
    Hello,
    MetricsTarget,
    OutputColumns,
    RequestProblem,
    StepMessage,
    pack,
    pack_problem,
)
from cluster.step_recorder import StepRecorder
from engine import (
    CacheCapacity,
    EngineDeadError,
    EngineStats,
    LLMEngine,
    LossWaterfall,
    RecordedStep,
    Request,
    RequestError,
    RequestId,
    TokenOutput,
)

HEARTBEAT_SECONDS = 1.0
STEP_SECONDS = 1.5  # a replica that begins no step for so long is idle


class RankWatch(Protocol):
    """An executor that notices the death of a rank by itself."""

    death: EngineDeadError | None
    pids: dict[int, int]
    recorder: StepRecorder

    def watch(self) -> None:
        """Begin to notice, on the running loop."""
        ...


class EngineHost:
    """Serves one started engine; `ranks`, where there are any to watch, are asked for their health."""

    def __init__(
        self,
        engine: LLMEngine,
        capacity: CacheCapacity,
        metrics: MetricsTarget,
        ranks: RankWatch | None = None,
    ) -> None:
        self._engine = engine
        self._capacity = capacity
        self._metrics = metrics
        self._ranks = ranks
        self._streams: dict[str, _Stream] = {}
        self._started = time.monotonic()
        self._recent = RecentLosses(engine.stats)
        self._remembering = asyncio.get_running_loop().create_task(self._recent.run(), name="recent losses")
        if ranks is not None:
            ranks.watch()

    def submit(
        self, ingress_id: str, requests: Sequence[Request], aborted: Iterable[Abort] = ()
    ) -> list[RequestProblem | None]:
        """Queue requests, and end others; per request None or what is wrong with it. Raises `EngineDeadError`."""
        stream = self._streams.get(ingress_id)
        if stream is None:
            raise EngineDeadError(f"Ingress {ingress_id} has no open stream to this replica.")
        for request_id, reason in aborted:
            self._engine.abort(request_id, reason)
        problems: list[RequestProblem | None] = []
        for request in requests:
            try:
                self._engine.submit(request, stream)
            except RequestError as error:
                problems.append(pack_problem(error))
            else:
                stream.open.add(request.request_id)
                problems.append(None)
        return problems

    async def outputs(
        self, ingress_id: str, ingress_metrics: MetricsTarget
    ) -> AsyncGenerator[Hello | StepMessage, None]:
        """The stream of one ingress: a `Hello`, then a message per step, or a heartbeat each second.

        Raises `EngineDeadError` instead of the `Hello` when the engine has died: nobody shall route to it.
        """
        self.check()
        stream = _Stream(ingress_metrics)
        self._end(ingress_id)  # a second stream of an ingress means that it has lost the first
        self._streams[ingress_id] = stream
        try:
            yield Hello(
                replica_id=self._metrics.process_id,
                capacity_tokens=self._capacity.num_tokens,
                block_size=self._capacity.block_size,
                metrics=self._metrics,
            )
            while not stream.is_over:
                yield await self._next_message(stream)
        finally:
            if self._streams.get(ingress_id) is stream:
                self._end(ingress_id)

    def stats(self) -> tuple[EngineStats, float]:
        """The engine's numbers, and the seconds since it was ready."""
        return self._engine.stats(), time.monotonic() - self._started

    def recent_losses(self) -> LossWaterfall | None:
        """How far the last seconds were from the optimum, and why; None where that is unknown."""
        return self._recent.waterfall()

    async def answer(self, question: Question) -> Answer:
        """What an ingress wants to know, for people who are looking; raises `EngineDeadError`."""
        self.check()
        return self._report() if question is Question.REPORT else await self._record()

    def check(self) -> None:
        """Raise `EngineDeadError` if the engine or one of its ranks has died. Busy is not dead."""
        death = self._engine.death or (self._ranks.death if self._ranks is not None else None)
        if death is not None:
            raise death

    async def close(self) -> None:
        """End every stream, then the engine."""
        for ingress_id in list(self._streams):
            self._end(ingress_id)
        self._remembering.cancel()
        await asyncio.gather(self._remembering, return_exceptions=True)
        await self._engine.close()

    def _report(self) -> ReplicaReport:
        stats = self._engine.stats()
        prompt, generated = self._recent.tokens_per_second()
        pids = {} if self._ranks is None else self._ranks.pids
        return ReplicaReport(
            node=self._metrics.address.rpartition(":")[0],
            ranks=tuple(pids[rank] for rank in sorted(pids)),
            uptime_seconds=time.monotonic() - self._started,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            kv_usage=stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0,
            num_preemptions=stats.num_preemptions,
            prompt_tokens_per_second=prompt,
            generated_tokens_per_second=generated,
            waterfall=self._recent.waterfall(),
        )

    async def _record(self) -> tuple[RecordedStep, ...]:
        return () if self._ranks is None else await self._ranks.recorder.record(STEP_SECONDS)

    async def _next_message(self, stream: "_Stream") -> StepMessage:
        is_heartbeat = not await stream.wait(HEARTBEAT_SECONDS)
        if stream.death is None and is_heartbeat and self._ranks is not None and self._ranks.death is not None:
            stream.fail(self._ranks.death)
        stats = self._engine.stats()
        load = LoadSnapshot(
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_free_tokens=(stats.num_blocks - stats.num_used_blocks) * stats.block_size,
        )
        return StepMessage(
            outputs=stream.take(),
            load=load,
            ingresses=stream.news_of(tuple(other.metrics for other in self._streams.values())),
            death=None if stream.death is None else str(stream.death),
        )

    def _end(self, ingress_id: str) -> None:
        stream = self._streams.pop(ingress_id, None)
        if stream is not None:
            open_requests, stream.open = stream.open, set()
            for request_id in open_requests:
                self._engine.abort(request_id)
            stream.end()


class _Stream:
    """The `OutputSink` of one ingress: collects what steps put until it is taken."""

    def __init__(self, metrics: MetricsTarget) -> None:
        self.metrics = metrics
        self.open: set[RequestId] = set()
        self.death: EngineDeadError | None = None
        self._is_ended = False
        self._told: tuple[MetricsTarget, ...] = ()
        self._outputs: list[TokenOutput] = []
        self._wake = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Nothing will come after what was taken last."""
        return self._is_ended or self.death is not None

    def put(self, outputs: list[TokenOutput]) -> None:
        self._outputs += outputs
        for output in outputs:
            if output.finish_reason is not None:
                self.open.discard(output.request_id)
        self._wake.set()

    def fail(self, error: EngineDeadError) -> None:
        self.death = error
        self.open.clear()
        self._wake.set()

    def end(self) -> None:
        self._is_ended = True
        self._wake.set()

    async def wait(self, seconds: float) -> bool:
        """Whether there is something to take before the time is over."""
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return False
        return True

    def news_of(self, ingresses: tuple[MetricsTarget, ...]) -> tuple[MetricsTarget, ...] | None:
        """The ingresses where they are not those told last."""
        if ingresses == self._told:
            return None
        self._told = ingresses
        return ingresses

    def take(self) -> OutputColumns:
        self._wake.clear()
        outputs, self._outputs = self._outputs, []
        return pack(outputs)
