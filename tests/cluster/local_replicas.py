"""Replicas without Ray: a `ReplicaTransport` straight into an `EngineHost` whose engine has a simulated executor."""

from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

from cluster.engine_host import EngineHost
from cluster.replica_report import Answer, Question
from cluster.step_message import Abort, Hello, MetricsTarget, RequestProblem, StepMessage
from engine import (
    Batch,
    CacheCapacity,
    DeviceKind,
    DType,
    EngineConfig,
    FinishedRequest,
    LLMEngine,
    ModelConfig,
    Request,
    SimulatedExecutor,
)

VOCABULARY = 512


def engine_config(model: ModelConfig) -> EngineConfig:
    return EngineConfig(
        model=model,
        checkpoint=Path("/nowhere"),
        dtype=DType.FLOAT32,
        device=DeviceKind.CPU,
        max_model_len=512,
        max_batch_tokens=64,
        max_sequences=20,
    )


class LocalReplica:
    """One engine behind the transport that an ingress uses; `fail_with` breaks the way to it."""

    def __init__(
        self,
        replica_id: str,
        config: EngineConfig,
        *,
        num_blocks: int = 64,
        step_seconds: Callable[[Batch], float] = lambda batch: 0.001,
        on_finished: Callable[[FinishedRequest], None] | None = None,
    ) -> None:
        self.replica_id = replica_id
        self.capacity = CacheCapacity(num_blocks=num_blocks, block_size=config.block_size)
        self.executor = SimulatedExecutor(self.capacity, vocab_size=VOCABULARY, step_seconds=step_seconds)
        self.engine = LLMEngine(config, self.executor, on_finished)
        self.fail_with: Exception | None = None
        self.num_submissions = 0

    async def start(self) -> None:
        await self.engine.start()
        target = MetricsTarget("replica", self.replica_id, "127.0.0.1:1")
        self.host = EngineHost(self.engine, self.capacity, target)

    async def outputs(self, ingress_id: str, metrics: MetricsTarget) -> AsyncGenerator[Hello | StepMessage, None]:
        async for message in self.host.outputs(ingress_id, metrics):
            if self.fail_with is not None:
                raise self.fail_with
            yield message

    async def submit(
        self, ingress_id: str, requests: Sequence[Request], aborted: Sequence[Abort]
    ) -> list[RequestProblem | None]:
        self.num_submissions += 1
        if self.fail_with is not None:
            raise self.fail_with
        return self.host.submit(ingress_id, requests, aborted)

    async def ask(self, question: Question) -> Answer:
        if self.fail_with is not None:
            raise self.fail_with
        return await self.host.answer(question)

    @property
    def num_open(self) -> int:
        stats = self.engine.stats()
        return stats.num_running + stats.num_waiting
