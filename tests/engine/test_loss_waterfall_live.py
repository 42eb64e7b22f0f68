"""The loss waterfall of real ranks on the CPU: what is done to them is found under its name, and the parts add up.

The ranks compute a real model and meet in real gloo collectives. The slow link is a peer that comes late to every
all-reduce: to rank 0 the same as a link that takes so long. Bounds leave room for a machine that is busy otherwise.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import (
    Batch,
    CacheCapacity,
    DType,
    EngineConfig,
    Executor,
    InlineExecutor,
    LLMEngine,
    Loss,
    LossWaterfall,
    Request,
    RequestId,
    SamplingParams,
    StepOutput,
)
from engine.local_group import LocalGroup
from engine.model_config import Architecture, ModelConfig
from engine.random_checkpoint import sized_config, write_random_checkpoint
from engine.worker import Worker

pytestmark = pytest.mark.slow

STALL_SECONDS = 0.05
LATE_SECONDS = 0.01


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A worker sets the threads of its process."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    model = sized_config(
        Architecture.LLAMA, hidden_size=256, intermediate_size=704, num_layers=4, num_heads=4, num_kv_heads=2
    )
    write_random_checkpoint(path, model)
    return path


def engine_config(checkpoint: Path, tensor_parallel: int = 1) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig.from_checkpoint(checkpoint),
        checkpoint=checkpoint,
        dtype=DType.FLOAT32,
        tensor_parallel=tensor_parallel,
        max_model_len=256,
        max_batch_tokens=256,
        max_sequences=32,
        block_size=16,
        num_blocks=600,
        num_threads=1,
        plan_seconds=0,  # a plan would hide the link that is slow on purpose
    )


class Stalled:
    """An executor whose steps wait before they are begun, each until the last one has ended."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._turn = asyncio.Lock()
        self.seconds = 0.0

    def start(self) -> CacheCapacity:
        return self._executor.start()

    async def execute(self, batch: Batch) -> StepOutput:
        async with self._turn:
            started = time.perf_counter()
            await asyncio.sleep(STALL_SECONDS)
            self.seconds += time.perf_counter() - started
            return await self._executor.execute(batch)

    def close(self) -> None:
        self._executor.close()


class TwoRanks:
    """Two ranks in processes of their own, of which the second comes late to every all-reduce."""

    def __init__(self, config: EngineConfig, late_seconds: float) -> None:
        self._group = LocalGroup(config)
        self._late_seconds = late_seconds
        self._thread = ThreadPoolExecutor(1)

    def start(self) -> CacheCapacity:
        self._group.__enter__()
        self._group.run(come_late, self._late_seconds)
        return self._group.capacity

    def execute(self, batch: Batch) -> Awaitable[StepOutput]:
        return asyncio.wrap_future(self._thread.submit(lambda: self._group.run(run_step, batch)[0]))

    def close(self) -> None:
        self._thread.shutdown()
        self._group.close()


def come_late(worker: Worker, late_seconds: float) -> None:
    """From now on rank 1 begins its collectives so much later."""
    import torch.distributed as dist

    if worker.tensor_parallel.rank == 0:
        return
    all_reduce = dist.all_reduce

    def late(*arguments: Any, **options: Any) -> Any:
        time.sleep(late_seconds)
        return all_reduce(*arguments, **options)

    dist.all_reduce = late


def run_step(worker: Worker, batch: Batch) -> StepOutput:
    return worker.execute(batch).wait()


@asynccontextmanager
async def serving(config: EngineConfig, executor: Executor) -> AsyncIterator[LLMEngine]:
    engine = LLMEngine(config, executor)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def answer(engine: LLMEngine, num_requests: int, prompt: int, output: int) -> None:
    async def one(index: int) -> None:
        request = Request(
            request_id=RequestId(f"r{index}"),
            prompt_token_ids=tuple((index + 3 * position) % 250 for position in range(prompt)),
            sampling=SamplingParams(max_tokens=output, ignore_eos=True, temperature=0),
        )
        async for _ in engine.generate(request):
            pass

    await asyncio.gather(*(one(index) for index in range(num_requests)))


async def measure(engine: LLMEngine, run: Callable[[], Awaitable[object]]) -> LossWaterfall:
    """The waterfall of `run`, whose parts must add up to what this test's own clock says."""
    earlier, began = engine.stats(), time.perf_counter()
    await run()
    wall, later = time.perf_counter() - began, engine.stats()
    waterfall = LossWaterfall.between(earlier, later)
    assert waterfall is not None
    parts = waterfall.ideal_seconds - waterfall.skipped_head_seconds + sum(waterfall.seconds.values())
    assert parts == pytest.approx(wall, rel=0.02), waterfall.table()
    return waterfall


async def test_a_busy_engine_adds_up(checkpoint: Path) -> None:
    config = engine_config(checkpoint)
    async with serving(config, InlineExecutor(config)) as engine:
        waterfall = await measure(engine, lambda: answer(engine, 32, prompt=100, output=50))
        assert sum(engine.stats().num_steps_by_plan.values()) == engine.stats().num_steps
    assert 0 < waterfall.percent_of_optimal < 200
    assert waterfall.seconds[Loss.EXPOSED_ATTENTION] > 0 and waterfall.seconds[Loss.OTHER_OPERATIONS] > 0
    assert waterfall.seconds[Loss.NO_REQUESTS] < 0.1 * waterfall.wall_seconds
    assert waterfall.seconds[Loss.CPU_GAP] < 0.5 * waterfall.wall_seconds


async def test_an_injected_stall_is_the_cpu_gap(checkpoint: Path) -> None:
    config = engine_config(checkpoint)
    executor = Stalled(InlineExecutor(config))
    async with serving(config, executor) as engine:
        waterfall = await measure(engine, lambda: answer(engine, 8, prompt=20, output=20))
    assert max(waterfall.seconds, key=lambda loss: waterfall.seconds[loss]) is Loss.CPU_GAP
    assert 0.99 * executor.seconds <= waterfall.seconds[Loss.CPU_GAP] <= 1.5 * executor.seconds


async def test_a_starved_queue_is_no_requests_and_small_batches(checkpoint: Path) -> None:
    config = engine_config(checkpoint)

    async with serving(config, InlineExecutor(config)) as engine:
        slept: list[float] = []

        async def trickle() -> None:
            for _ in range(3):
                began = time.perf_counter()
                await asyncio.sleep(0.5)
                slept.append(time.perf_counter() - began)
                await answer(engine, 1, prompt=20, output=40)

        waterfall = await measure(engine, trickle)
    assert 0.99 * sum(slept) <= waterfall.seconds[Loss.NO_REQUESTS] < 1.3 * sum(slept)
    assert waterfall.seconds[Loss.TRAFFIC_LIMITED_BATCH] > waterfall.ideal_seconds
    assert waterfall.seconds[Loss.KV_LIMITED_BATCH] == 0


async def test_a_slow_link_is_exposed_network(checkpoint: Path) -> None:
    config = engine_config(checkpoint, tensor_parallel=2)
    async with serving(config, TwoRanks(config, LATE_SECONDS)) as engine:
        waterfall = await measure(engine, lambda: answer(engine, 8, prompt=20, output=10))
        stats = engine.stats()
    # Two all-reduces a layer at least, each late; rank 0 may be a little late itself.
    late_seconds = stats.num_steps * 2 * config.model.num_layers * LATE_SECONDS
    assert waterfall.seconds[Loss.EXPOSED_NETWORK] > 0.7 * late_seconds
    assert max(waterfall.seconds, key=lambda loss: waterfall.seconds[loss]) is Loss.EXPOSED_NETWORK
    assert stats.network_seconds >= stats.exposed_network_seconds
