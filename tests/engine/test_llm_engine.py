import asyncio
import gc
from collections.abc import Awaitable, Callable

import pytest

from engine import (
    Batch,
    CacheCapacity,
    EngineConfig,
    EngineDeadError,
    FinishReason,
    LLMEngine,
    Request,
    RequestError,
    RequestId,
    SamplingParams,
    SimulatedExecutor,
    StepOutput,
    TokenOutput,
)

MakeConfig = Callable[..., EngineConfig]
MakeCapacity = Callable[[int], CacheCapacity]


class Collector:
    """A sink that remembers every call."""

    def __init__(self) -> None:
        self.steps: list[list[TokenOutput]] = []
        self.error: EngineDeadError | None = None

    def put(self, outputs: list[TokenOutput]) -> None:
        self.steps.append(outputs)

    def fail(self, error: EngineDeadError) -> None:
        self.error = error

    def tokens(self, request_id: str) -> list[int]:
        return [token for step in self.steps for out in step if out.request_id == request_id for token in out.token_ids]

    @property
    def num_finished(self) -> int:
        return sum(out.finish_reason is not None for step in self.steps for out in step)


def make_request(name: str, prompt: tuple[int, ...] = (1, 2, 3), **sampling: object) -> Request:
    params = SamplingParams(**({"max_tokens": 6} | sampling))  # type: ignore[arg-type]
    return Request(request_id=RequestId(name), prompt_token_ids=prompt, sampling=params)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def tokens_of(engine: LLMEngine, request: Request) -> list[int]:
    return [token async for output in engine.generate(request) for token in output.token_ids]


async def test_generates_in_order_up_to_the_limit(engine_config: MakeConfig, capacity: MakeCapacity) -> None:
    engine = LLMEngine(engine_config(), SimulatedExecutor(capacity(400), vocab_size=1000))
    await engine.start()
    outputs = [output async for output in engine.generate(make_request("a"))]
    assert [output.position for output in outputs] == list(range(6))
    assert [output.finish_reason for output in outputs] == [None] * 5 + [FinishReason.LENGTH]
    stats = engine.stats()
    assert (stats.num_generated_tokens, stats.num_prompt_tokens, stats.num_discarded_tokens) == (6, 3, 0)
    assert stats.num_used_blocks == 0 and stats.num_finished == {"length": 1}
    await engine.close()


async def test_same_tokens_alone_in_a_crowd_and_after_preemption(
    engine_config: MakeConfig, capacity: MakeCapacity
) -> None:
    requests = [make_request(str(i), tuple(range(i, i + 20)), max_tokens=40 - i, seed=i) for i in range(12)]

    async def run(num_blocks: int, together: bool, prefix_caching: bool) -> tuple[list[list[int]], int]:
        config = engine_config(prefix_caching=prefix_caching)
        engine = LLMEngine(config, SimulatedExecutor(capacity(num_blocks), vocab_size=1000))
        await engine.start()
        # Teach the predictor that answers are short, so that the small cache overflows.
        for i in range(40):
            await tokens_of(engine, make_request(f"short{i}", max_tokens=1))
        if together:
            tokens = list(await asyncio.gather(*(tokens_of(engine, request) for request in requests)))
        else:
            tokens = [await tokens_of(engine, request) for request in requests]
        stats = engine.stats()
        await engine.close()
        assert stats.num_used_blocks == 0
        return tokens, stats.num_preemptions

    alone, _ = await run(400, together=False, prefix_caching=False)
    crowd, no_preemptions = await run(400, together=True, prefix_caching=True)
    squeezed, preemptions = await run(40, together=True, prefix_caching=True)
    assert no_preemptions == 0 and preemptions > 0
    assert alone == crowd == squeezed


async def test_end_of_sequence_is_seen_one_step_late_and_the_extra_token_dropped(
    engine_config: MakeConfig, capacity: MakeCapacity
) -> None:
    engine = LLMEngine(engine_config(), SimulatedExecutor(capacity(400), vocab_size=1000))
    await engine.start()
    free = await tokens_of(engine, make_request("free", max_tokens=20))
    stop = free[4]
    outputs = [o async for o in engine.generate(make_request("a", max_tokens=20, stop_token_ids=frozenset({stop})))]
    assert [token for output in outputs for token in output.token_ids] == free[: free.index(stop) + 1]
    assert outputs[-1].finish_reason is FinishReason.STOP
    await until(lambda: engine.stats().num_discarded_tokens == 1)
    later = await tokens_of(engine, make_request("b", max_tokens=20, min_tokens=10, stop_token_ids=frozenset({stop})))
    assert later == free, "before min_tokens a stop token does not end the request"
    await engine.close()


async def test_outputs_of_one_step_reach_a_sink_in_one_call(engine_config: MakeConfig, capacity: MakeCapacity) -> None:
    executor = SimulatedExecutor(capacity(400), vocab_size=1000, step_seconds=lambda batch: 0.002)
    engine = LLMEngine(engine_config(), executor)
    await engine.start()
    sink = Collector()
    for i in range(10):
        engine.submit(make_request(str(i)), sink)
    await until(lambda: sink.num_finished == 10)
    assert len(sink.steps) == 6 and all(len(step) == 10 for step in sink.steps)
    await engine.close()


async def test_the_next_step_is_sent_before_the_last_result_is_there(
    engine_config: MakeConfig, capacity: MakeCapacity
) -> None:
    class Gate(SimulatedExecutor):
        """Counts the steps that were sent while an earlier one was still running."""

        sent = finished = ahead = 0

        async def execute(self, batch: Batch) -> StepOutput:
            self.sent += 1
            self.ahead += self.sent - self.finished > 1
            output = await super().execute(batch)
            self.finished += 1
            return output

    executor = Gate(capacity(400), vocab_size=1000, step_seconds=lambda batch: 0.002)
    engine = LLMEngine(engine_config(), executor)
    await engine.start()
    await tokens_of(engine, make_request("a", max_tokens=20))
    assert executor.ahead == 19, "every step but the first is composed while its predecessor runs"
    await engine.close()


async def test_abort_frees_blocks_at_once_and_ends_the_stream(
    engine_config: MakeConfig, capacity: MakeCapacity
) -> None:
    executor = SimulatedExecutor(capacity(400), vocab_size=1000, step_seconds=lambda batch: 0.005)
    engine = LLMEngine(engine_config(), executor)
    await engine.start()
    sink = Collector()
    engine.submit(make_request("a", max_tokens=500), sink)
    await until(lambda: len(sink.steps) >= 3)
    assert engine.stats().num_used_blocks > 0
    engine.abort(RequestId("a"))
    engine.abort(RequestId("a"))
    engine.abort(RequestId("unknown"))
    assert engine.stats().num_used_blocks == 0
    assert sink.steps[-1][0].finish_reason is FinishReason.ABORT and sink.steps[-1][0].token_ids == ()
    async for _ in engine.generate(make_request("b", max_tokens=500)):
        break  # leaving the iteration aborts
    await until(lambda: engine.stats().num_running == 0)
    assert engine.stats().num_used_blocks == 0
    await engine.close()


async def test_a_reader_that_found_the_end_is_a_stop_to_learn_from(
    engine_config: MakeConfig, capacity: MakeCapacity
) -> None:
    executor = SimulatedExecutor(capacity(400), vocab_size=1000, step_seconds=lambda batch: 0.001)
    engine = LLMEngine(engine_config(), executor)
    await engine.start()
    sink = Collector()
    engine.submit(make_request("a", max_tokens=500), sink)
    await until(lambda: len(sink.steps) >= 2)
    engine.abort(RequestId("a"), FinishReason.STOP)
    assert sink.steps[-1][0].finish_reason is FinishReason.STOP
    assert engine.stats().num_finished == {"stop": 1} and engine.stats().num_used_blocks == 0
    await engine.close()


async def test_more_requests_than_room_all_finish(engine_config: MakeConfig, capacity: MakeCapacity) -> None:
    engine = LLMEngine(engine_config(), SimulatedExecutor(capacity(260), vocab_size=1000))
    await engine.start()
    results = await asyncio.gather(
        *(tokens_of(engine, make_request(str(i), tuple(range(40)), max_tokens=10 + i % 7)) for i in range(300))
    )
    assert [len(tokens) for tokens in results] == [10 + i % 7 for i in range(300)]
    await engine.close()


@pytest.mark.parametrize(
    ("request_", "parameter"),
    [
        (make_request("a", ()), "prompt"),
        (make_request("a", (1, 1000)), "prompt"),
        (make_request("a", (-1,)), "prompt"),
        (make_request("a", max_tokens=0), "max_tokens"),
        (make_request("a", temperature=-0.1), "temperature"),
        (make_request("a", temperature=float("nan")), "temperature"),
        (make_request("a", top_p=0.0), "top_p"),
        (make_request("a", min_tokens=7), "min_tokens"),
        (make_request("a", logit_bias=((1000, 1.0),)), "logit_bias"),
        (make_request("a", logprobs=21), "logprobs"),
        (make_request("a", max_tokens=1022), "prompt"),
    ],
)
async def test_bad_requests_are_refused_by_the_name_of_the_field(
    engine_config: MakeConfig, capacity: MakeCapacity, request_: Request, parameter: str
) -> None:
    engine = LLMEngine(engine_config(), SimulatedExecutor(capacity(400), vocab_size=1000))
    await engine.start()
    with pytest.raises(RequestError) as caught:
        engine.submit(request_, Collector())
    assert caught.value.parameter == parameter
    assert engine.stats().num_waiting == 0
    await engine.close()


async def test_a_failed_step_ends_every_request_and_refuses_new_ones(
    engine_config: MakeConfig, capacity: MakeCapacity
) -> None:
    class Breaks(SimulatedExecutor):
        def execute(self, batch: Batch) -> Awaitable[StepOutput]:  # type: ignore[override]
            if batch.step == 3:
                raise RuntimeError("rank 1: out of memory")
            return super().execute(batch)

    engine = LLMEngine(engine_config(), Breaks(capacity(400), vocab_size=1000))
    await engine.start()
    sinks = [Collector(), Collector()]
    for i in range(4):
        engine.submit(make_request(str(i), max_tokens=100), sinks[i % 2])
    await until(lambda: all(sink.error is not None for sink in sinks))
    assert "rank 1: out of memory" in str(sinks[0].error)
    with pytest.raises(EngineDeadError, match="rank 1"):
        engine.submit(make_request("late"), Collector())
    with pytest.raises(EngineDeadError):
        await tokens_of(engine, make_request("later"))
    await engine.close()


async def test_closing_fails_open_requests(engine_config: MakeConfig, capacity: MakeCapacity) -> None:
    executor = SimulatedExecutor(capacity(400), vocab_size=1000, step_seconds=lambda batch: 0.01)
    engine = LLMEngine(engine_config(), executor)
    await engine.start()
    sink = Collector()
    engine.submit(make_request("a", max_tokens=900), sink)
    await until(lambda: len(sink.steps) > 1)
    await engine.close()
    await engine.close()
    assert sink.error is not None


async def test_the_collector_forgets_what_was_there_at_the_start_until_the_end(
    engine_config: MakeConfig, capacity: MakeCapacity
) -> None:
    engine = LLMEngine(engine_config(), SimulatedExecutor(capacity(400), vocab_size=1000))
    await engine.start()
    assert gc.get_freeze_count() > 1000
    await engine.close()
    assert gc.get_freeze_count() == 0
    await engine.close()


async def test_a_step_that_does_not_end_is_seen_and_idle_time_is_not(
    engine_config: MakeConfig, capacity: MakeCapacity
) -> None:
    """`seconds_since_step` is the watchdog's number."""

    class Hanging(SimulatedExecutor):
        def __init__(self) -> None:
            super().__init__(capacity(400), vocab_size=1000)
            self.may_end = asyncio.Event()

        async def execute(self, batch: Batch) -> StepOutput:
            await self.may_end.wait()
            return await super().execute(batch)

    executor = Hanging()
    engine = LLMEngine(engine_config(), executor)
    await engine.start()
    await asyncio.sleep(0.05)
    assert engine.stats().seconds_since_step == 0, "nobody asked for anything"
    reading = asyncio.create_task(tokens_of(engine, make_request("a")))
    await until(lambda: engine.stats().seconds_since_step > 0.2)
    executor.may_end.set()
    await reading
    await until(lambda: engine.stats().seconds_since_step == 0)
    engine.submit(make_request("b"), Collector())
    engine.abort(RequestId("b"))
    await until(lambda: engine.stats().seconds_since_step == 0)
    await engine.close()
