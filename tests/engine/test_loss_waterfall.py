"""An engine over scripted steps: each disturbance has its own name, and the parts add up to the wall clock."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from engine import (
    Batch,
    CacheCapacity,
    EngineConfig,
    LLMEngine,
    Loss,
    LossWaterfall,
    Request,
    RequestId,
    SamplingParams,
    SimulatedExecutor,
    StepOutput,
    StepTimes,
    TokenOutput,
)
from engine.optimum import active_parameters

MakeConfig = Callable[..., EngineConfig]

OPTIMUM = 40_000.0  # tokens per second; a step of 64 tokens takes 1.6 ms at the peak
FULL_EFFICIENCY = 0.4


@dataclass(frozen=True, kw_only=True)
class Script:
    """What a step costs beside its matrix products, in seconds; `stall` passes between steps, on no device."""

    attention: float = 0.0005
    exposed_network: float = 0.0
    network: float = 0.0
    other: float = 0.0005
    stall: float = 0.0
    num_padding_tokens: int = 0
    plan: str = "sequential"


class ScriptedExecutor(SimulatedExecutor):
    """Sleeps through scripted steps and reports their parts, stretched as the sleep was stretched by a busy machine.

    Matrix products run at `FULL_EFFICIENCY` of the peak in a full batch and at half of that in any smaller one.
    """

    def __init__(self, config: EngineConfig, script: Script, num_blocks: int = 2000) -> None:
        self._peak = OPTIMUM * 2 * active_parameters(config.model)
        capacity = CacheCapacity(
            num_blocks=num_blocks,
            block_size=config.block_size,
            gemm_flops_per_second=self._peak,
            dense_flops_per_second=self._peak * FULL_EFFICIENCY,
        )
        super().__init__(capacity, vocab_size=1000, step_seconds=self._planned_seconds)
        self._turn = asyncio.Lock()
        self._script = script
        self._config = config
        self.stalled = self.exposed = self.attention = 0.0

    def _gemm_seconds(self, batch: Batch) -> float:
        model = self._config.model
        head = model.hidden_size * model.vocab_size
        rows = batch.num_tokens + self._script.num_padding_tokens
        flops = 2 * (rows * (active_parameters(model) - head) + len(batch.sampled) * head)
        efficiency = FULL_EFFICIENCY if rows >= self._config.max_batch_tokens else FULL_EFFICIENCY / 2
        return flops / self._peak / efficiency

    def _planned_seconds(self, batch: Batch) -> float:
        script = self._script
        return self._gemm_seconds(batch) + script.attention + script.exposed_network + script.other

    async def execute(self, batch: Batch) -> StepOutput:
        script = self._script
        async with self._turn:
            began = time.perf_counter()
            if script.stall:
                await asyncio.sleep(script.stall)
            started = time.perf_counter()
            output = await super().execute(batch)
            seconds = time.perf_counter() - started
            stretch = seconds / self._planned_seconds(batch)
            self.stalled += started - began
            self.exposed += script.exposed_network * stretch
            self.attention += script.attention * stretch
            times = StepTimes(
                gemm_seconds=self._gemm_seconds(batch) * stretch,
                attention_seconds=script.attention * stretch,
                exposed_network_seconds=script.exposed_network * stretch,
                network_seconds=script.network * stretch,
            )
            return replace(
                output,
                device_seconds=seconds,
                times=times,
                plan=script.plan,
                num_padding_tokens=script.num_padding_tokens,
            )


class Sink:
    """Counts requests that ended."""

    def __init__(self, num_requests: int) -> None:
        self._num_open = num_requests
        self.finished = asyncio.Event()

    def put(self, outputs: list[TokenOutput]) -> None:
        self._num_open -= sum(output.finish_reason is not None for output in outputs)
        if self._num_open == 0:
            self.finished.set()

    def fail(self, error: Exception) -> None:
        raise error


async def serve(
    engine: LLMEngine, num_requests: int, prompt: int, output: int, name: str = "r", **more: object
) -> None:
    """All at once, to their ends."""
    sink = Sink(num_requests)
    for index in range(num_requests):
        token_ids = tuple((7 * index + position) % 1000 for position in range(prompt))
        sampling = SamplingParams(**({"max_tokens": output, "ignore_eos": True} | more))  # type: ignore[arg-type]
        engine.submit(
            Request(request_id=RequestId(f"{name}{index}"), prompt_token_ids=token_ids, sampling=sampling), sink
        )
    async with asyncio.timeout(60):
        await sink.finished.wait()


class Measured:
    """A started engine whose waterfall, from `begin` to `end`, is held against this test's own clock."""

    def __init__(self, config: EngineConfig, script: Script, num_blocks: int = 2000) -> None:
        self.executor = ScriptedExecutor(config, script, num_blocks)
        self.engine = LLMEngine(config, self.executor)

    async def begin(self) -> None:
        self._before = time.perf_counter()
        self.earlier, self._after = self.engine.stats(), time.perf_counter()

    async def end(self) -> LossWaterfall:
        least = time.perf_counter() - self._after
        self.later = self.engine.stats()
        most = time.perf_counter() - self._before
        await self.engine.close()
        waterfall = LossWaterfall.between(self.earlier, self.later)
        assert waterfall is not None
        assert 0.98 * least <= waterfall.wall_seconds <= 1.02 * most  # however long the machine was busy elsewhere
        named = waterfall.ideal_seconds - waterfall.skipped_head_seconds + sum(waterfall.seconds.values())
        assert named == pytest.approx(waterfall.wall_seconds, rel=0.02), waterfall.table()
        assert all(seconds >= 0 for seconds in waterfall.seconds.values())
        return waterfall


async def started(config: EngineConfig, script: Script, num_blocks: int = 2000) -> Measured:
    measured = Measured(config, script, num_blocks)
    await measured.engine.start()
    await measured.begin()
    return measured


def largest(waterfall: LossWaterfall) -> Loss:
    return max(Loss, key=lambda loss: waterfall.seconds[loss])


async def test_full_batches_lose_to_products_below_their_peak(engine_config: MakeConfig) -> None:
    measured = await started(engine_config(prefix_caching=False), Script(plan="split-2"))
    await serve(measured.engine, 60, prompt=63, output=1)
    waterfall = await measured.end()
    stats = measured.later
    assert waterfall.seconds[Loss.GEMM_BELOW_PEAK] > 0.5 * waterfall.ideal_seconds
    assert largest(waterfall) is Loss.GEMM_BELOW_PEAK
    assert waterfall.seconds[Loss.EXPOSED_ATTENTION] == pytest.approx(measured.executor.attention)
    assert waterfall.seconds[Loss.KV_LIMITED_BATCH] == 0
    assert stats.num_steps_by_plan == {"split-2": stats.num_steps}
    useful = stats.num_batch_tokens - stats.num_discarded_tokens
    assert waterfall.achieved_tokens_per_second * waterfall.wall_seconds == pytest.approx(useful)


async def test_a_stall_between_steps_is_a_cpu_gap(engine_config: MakeConfig) -> None:
    measured = await started(engine_config(), Script(stall=0.02))
    await serve(measured.engine, 16, prompt=4, output=15)
    waterfall = await measured.end()
    assert largest(waterfall) is Loss.CPU_GAP
    assert waterfall.seconds[Loss.CPU_GAP] >= 0.9 * measured.executor.stalled


async def test_a_starved_queue_is_no_requests_and_a_batch_limited_by_traffic(engine_config: MakeConfig) -> None:
    measured = await started(engine_config(), Script())
    await asyncio.sleep(0.2)
    await serve(measured.engine, 3, prompt=4, output=100)
    await asyncio.sleep(0.2)
    waterfall = await measured.end()
    assert waterfall.seconds[Loss.NO_REQUESTS] >= 0.4
    assert waterfall.seconds[Loss.TRAFFIC_LIMITED_BATCH] > 0
    assert waterfall.seconds[Loss.KV_LIMITED_BATCH] == waterfall.seconds[Loss.SEQUENCE_LIMITED_BATCH] == 0


async def test_a_slow_link_is_exposed_network_and_what_overlap_hides_is_no_loss(engine_config: MakeConfig) -> None:
    measured = await started(engine_config(), Script(exposed_network=0.01, network=0.025))
    await serve(measured.engine, 16, prompt=4, output=20)
    waterfall = await measured.end()
    assert largest(waterfall) is Loss.EXPOSED_NETWORK
    assert waterfall.seconds[Loss.EXPOSED_NETWORK] == pytest.approx(measured.executor.exposed)
    assert measured.later.hidden_network_seconds == pytest.approx(1.5 * measured.executor.exposed)


async def test_a_full_cache_is_a_batch_limited_by_kv(engine_config: MakeConfig) -> None:
    # Each request needs 8 of the 16 blocks: two run at once, the others wait for blocks with rows to spare. Behind the
    # last two nobody waits: one round of eighteen, in which the machine may be busy.
    measured = await started(engine_config(prefix_caching=False), Script(), num_blocks=16)
    await serve(measured.engine, 36, prompt=4, output=28)
    waterfall = await measured.end()
    small = {loss for loss in Loss if loss.endswith("limited_batch") and waterfall.seconds[loss] > 0}
    assert waterfall.seconds[Loss.KV_LIMITED_BATCH] > 2 * waterfall.seconds[Loss.TRAFFIC_LIMITED_BATCH]
    assert Loss.SEQUENCE_LIMITED_BATCH not in small


async def test_full_rows_are_a_batch_limited_by_sequences(engine_config: MakeConfig) -> None:
    measured = await started(engine_config(max_sequences=4), Script())
    await serve(measured.engine, 40, prompt=4, output=10)
    waterfall = await measured.end()
    assert waterfall.seconds[Loss.SEQUENCE_LIMITED_BATCH] > 2 * waterfall.seconds[Loss.TRAFFIC_LIMITED_BATCH]
    assert waterfall.seconds[Loss.KV_LIMITED_BATCH] == 0


async def test_padding_has_its_name(engine_config: MakeConfig) -> None:
    measured = await started(engine_config(), Script(num_padding_tokens=16))
    await serve(measured.engine, 8, prompt=4, output=20)
    waterfall = await measured.end()
    # 16 rows of padding beside 8 decodes, though padding skips the output head.
    assert waterfall.seconds[Loss.PADDING] > waterfall.ideal_seconds
    assert measured.later.num_padding_tokens == 16 * measured.later.num_steps


async def test_tokens_computed_again_after_a_preemption_are_discarded(engine_config: MakeConfig) -> None:
    measured = Measured(engine_config(prefix_caching=False), Script(), num_blocks=40)
    await measured.engine.start()
    # Teach the predictor that answers are short, so that the small cache overflows.
    await serve(measured.engine, 40, prompt=3, output=1, name="short")
    await measured.begin()
    await serve(measured.engine, 12, prompt=20, output=30)
    waterfall = await measured.end()
    stats = measured.later
    assert stats.num_preemptions > 0 and stats.num_discarded_tokens > 0
    assert waterfall.seconds[Loss.DISCARDED_TOKENS] > 0.1 * waterfall.ideal_seconds
    # Every position of every request was useful once, but its last token, which is never an input.
    useful = waterfall.achieved_tokens_per_second * waterfall.wall_seconds
    assert useful == pytest.approx(12 * (20 + 30 - 1))


async def test_a_token_drawn_after_the_end_is_discarded(engine_config: MakeConfig) -> None:
    measured = await started(engine_config(), Script())
    await serve(measured.engine, 1, prompt=3, output=9, stop_token_ids=frozenset(range(1000)))
    await serve(measured.engine, 1, prompt=3, output=9)  # by the end of which the token too many has come back
    waterfall = await measured.end()
    assert measured.later.num_discarded_tokens == 1
    assert waterfall.seconds[Loss.DISCARDED_TOKENS] > 0


async def test_without_a_measured_peak_nothing_is_claimed(engine_config: MakeConfig) -> None:
    config = engine_config()
    engine = LLMEngine(config, SimulatedExecutor(CacheCapacity(num_blocks=100, block_size=4), vocab_size=1000))
    await engine.start()
    await serve(engine, 2, prompt=3, output=4)
    stats = engine.stats()
    assert stats.optimal_tokens_per_second is None and stats.loss_seconds == {}
    assert LossWaterfall.between(stats, stats) is None
    await engine.close()
