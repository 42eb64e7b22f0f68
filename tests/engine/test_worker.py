"""Ranks from start to close: capacity, warm-up that leaves nothing behind, tensor parallelism, the inline executor."""

import asyncio
import multiprocessing
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.batch import Batch
from engine.config import DeviceKind, EngineConfig
from engine.errors import CapacityError, CheckpointError, ConfigError, EngineDeadError
from engine.inline_executor import InlineExecutor
from engine.kv_cache import KVCache
from engine.memory_budget import bytes_per_block, num_affordable_blocks
from engine.memory_use import MemoryPart
from engine.model_config import Architecture, DType, ModelConfig
from engine.number_format import NumberFormat
from engine.random_checkpoint import sized_config, write_random_checkpoint
from engine.request import SamplingParams
from engine.weight_layout import rank_weight_bytes
from engine.worker import Worker
from tests.engine.batch_script import BatchScript

NUM_BLOCKS = 40
PROMPTS = [[65, 66, 67, 68, 69, 70, 71], [72, 73], [74] * 11]
SAMPLINGS = [
    SamplingParams(temperature=0),
    SamplingParams(seed=3, top_p=0.95, logprobs=1),
    SamplingParams(seed=4, frequency_penalty=0.3),
]
NUM_DECODES = 6


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A worker sets the threads of its process."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """A tiny checkpoint; float64, so that sharding does not decide between two tokens."""
    path = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(path, sized_config(Architecture.LLAMA))
    return EngineConfig(
        model=ModelConfig.from_checkpoint(path),
        checkpoint=path,
        dtype=DType.FLOAT64,
        max_model_len=64,
        max_batch_tokens=64,
        max_sequences=4,
        block_size=4,
        num_blocks=NUM_BLOCKS,
        num_threads=1,
        plan_seconds=0,
    )


def scripted_steps() -> list[Batch]:
    """Chunked prefills beside decodes, then decodes."""
    script = BatchScript(NUM_BLOCKS - 3, 4)
    for row, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True)):
        script.admit(row, prompt, sampling)
    steps = [script.step(prefills=[(0, 7), (2, 3)]), script.step(decodes=[0], prefills=[(1, 2), (2, 8)])]
    return steps + [script.step(decodes=[0, 1, 2]) for _ in range(NUM_DECODES)]


def run_steps(worker: Worker) -> list[list[int]]:
    """The tokens of every step, all launched before any is read."""
    return [pending.wait().token_ids.tolist() for pending in [worker.execute(batch) for batch in scripted_steps()]]


@pytest.fixture(scope="module")
def expected(config: EngineConfig) -> list[list[int]]:
    """The tokens of one rank in this process."""
    worker = Worker(config)
    worker.start()
    return run_steps(worker)


def test_start_tells_progress_and_capacity(config: EngineConfig) -> None:
    seen: list[tuple[int, int]] = []
    worker = Worker(config)
    capacity = worker.start(lambda done, total: seen.append((done, total)))
    assert (capacity.num_blocks, capacity.block_size) == (NUM_BLOCKS, 4)
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] > 0
    assert torch.get_num_threads() == 1
    worker.close()
    worker.close()
    with pytest.raises(EngineDeadError, match="Rank 0 is not running"):
        worker.execute(scripted_steps()[0])


def test_two_starts_draw_the_same(config: EngineConfig, expected: list[list[int]]) -> None:
    worker = Worker(config)
    worker.start()
    assert run_steps(worker) == expected
    assert len({token for step in expected for token in step}) > NUM_DECODES
    worker.close()


def _run_rank(config: EngineConfig, rank: int, rendezvous: str, results: "multiprocessing.Queue[object]") -> None:
    try:
        worker = Worker(config, rank, rendezvous, timeout_seconds=60)
        capacity = worker.start()
        pending = [worker.execute(batch) for batch in scripted_steps()]
        outputs = [step.wait() for step in pending]
        logprobs = [output.logprobs is not None for output in outputs]
        results.put((rank, capacity.num_blocks, [output.token_ids.tolist() for output in outputs], logprobs))
        worker.close()
    except Exception as error:  # the parent shall see it instead of waiting
        results.put(error)


def run_ranks(configs: list[EngineConfig]) -> dict[int, object]:
    """Each config as one rank in a process of its own: what it returned, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        rendezvous = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[object] = context.Queue()
    ranks = [
        context.Process(target=_run_rank, args=(config, rank, rendezvous, results))
        for rank, config in enumerate(configs)
    ]
    for process in ranks:
        process.start()
    try:
        outcomes = [results.get(timeout=120) for _ in ranks]
    finally:
        for process in ranks:
            process.join(timeout=30)
            process.kill()
    return {index if isinstance(outcome, Exception) else outcome[0]: outcome for index, outcome in enumerate(outcomes)}  # type: ignore[index]


@pytest.mark.slow
def test_two_ranks_draw_what_one_rank_draws(config: EngineConfig, expected: list[list[int]]) -> None:
    """Every rank has every token, rank 0 alone the log-probabilities, and the smaller cache counts."""
    pair = replace(config, tensor_parallel=2)
    outcomes = run_ranks([pair, replace(pair, num_blocks=NUM_BLOCKS - 3)])
    some_logprobs = [False] + [True] * (NUM_DECODES + 1)
    assert outcomes[0] == (0, NUM_BLOCKS - 3, expected, some_logprobs)
    assert outcomes[1] == (1, NUM_BLOCKS - 3, expected, [False] * (NUM_DECODES + 2))


@pytest.mark.slow
def test_a_rank_without_room_stops_the_others(config: EngineConfig) -> None:
    pair = replace(config, tensor_parallel=2)
    outcomes = run_ranks([pair, replace(pair, num_blocks=3)])
    assert all(isinstance(outcome, CapacityError) for outcome in outcomes.values())
    messages = sorted(str(outcome) for outcome in outcomes.values())
    assert messages[0].startswith("Another rank") and "holds 12 tokens" in messages[1]


def test_a_rank_that_stays_alone_gives_up(config: EngineConfig) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        rendezvous = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    worker = Worker(replace(config, tensor_parallel=2), 1, rendezvous, timeout_seconds=1)
    with pytest.raises(EngineDeadError, match=r"Rank 1 of 2 could not join its group at tcp://127\.0\.0\.1"):
        worker.start()
    worker.close()


def test_wrong_ranks_and_devices_are_refused(config: EngineConfig) -> None:
    with pytest.raises(ConfigError, match=r"rank must be 0\.\.0, but is 1"):
        Worker(config, rank=1)
    with pytest.raises(ConfigError, match="needs a rendezvous"):
        Worker(replace(config, tensor_parallel=2))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="process sees 0"):
            Worker(replace(config, device=DeviceKind.CUDA)).start()


def test_fp8_through_the_whole_rank(config: EngineConfig) -> None:
    """Emulated, every step runs, and the memory of weights and cache is what the budget says."""
    fp8 = replace(config, dtype=DType.BFLOAT16, product_format=NumberFormat.FP8)
    with pytest.raises(ConfigError, match="device cpu has no FP8 matrix products"):
        Worker(fp8).start()
    worker = Worker(fp8, emulates_fp8=True)
    worker.start()
    tokens = run_steps(worker)
    assert len({token for step in tokens for token in step}) > NUM_DECODES
    plain = Worker(replace(config, dtype=DType.BFLOAT16))
    plain.start()
    assert plain.config.product_format is NumberFormat.BFLOAT16
    assert run_steps(plain)[0] == tokens[0], "the first greedy token is clear enough for any format"
    uses = [each.memory() for each in (worker, plain)]
    for use, settings in zip(uses, (fp8, config), strict=True):
        if use is None:
            continue  # no /proc here
        dtype = DType.BFLOAT16
        weights = rank_weight_bytes(config.model, dtype, in_fp8=settings is fp8)
        assert use.parts[MemoryPart.WEIGHTS] == weights
        cache = NUM_BLOCKS * bytes_per_block(replace(settings, dtype=dtype))
        assert use.parts[MemoryPart.KV_CACHE] == cache
    for each in (worker, plain):
        each.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fp8_on_a_gpu_begins_as_emulated(config: EngineConfig) -> None:
    """The first greedy tokens; what follows a rounding that differs may differ."""
    fp8 = replace(config, dtype=DType.BFLOAT16, product_format=NumberFormat.FP8, block_size=16, max_model_len=128)
    on_gpu, emulated = Worker(replace(fp8, device=DeviceKind.CUDA)), Worker(fp8, emulates_fp8=True)
    for worker in (on_gpu, emulated):
        worker.start()
    assert run_steps(on_gpu)[0] == run_steps(emulated)[0]
    use = on_gpu.memory()
    assert use is not None
    assert use.device_parts[MemoryPart.KV_CACHE] == NUM_BLOCKS * bytes_per_block(fp8)
    for worker in (on_gpu, emulated):
        worker.close()


# --- sizing -----------------------------------------------------------------------------------------------------


def test_cache_sizing(config: EngineConfig) -> None:
    per_block = bytes_per_block(config)
    cache = KVCache.allocate(config, 3, torch.device("cpu"))
    assert per_block * 3 == sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    assert bytes_per_block(replace(config, tensor_parallel=2)) == per_block // 2
    assert bytes_per_block(replace(config, kv_cache_format=NumberFormat.FP8)) == per_block // 8
    free = 2**34
    by_bytes = replace(config, num_blocks=None, cache_bytes=100 * per_block + 1)
    by_default = replace(config, num_blocks=None)
    on_gpu = replace(by_default, device=DeviceKind.CUDA, cache_fraction=0.5)
    assert num_affordable_blocks(config, free) == NUM_BLOCKS
    assert num_affordable_blocks(by_bytes, free) == 100
    assert num_affordable_blocks(by_default, free) == 2**30 // per_block
    assert num_affordable_blocks(by_default, 2**28) == int(0.9 * 2**28) // per_block
    assert num_affordable_blocks(on_gpu, free) == free // 2 // per_block


def test_default_holds_the_longest_sequence_where_memory_allows(config: EngineConfig) -> None:
    large = replace(config, num_blocks=None, max_model_len=2048, model=replace(config.model, num_layers=2000))
    assert bytes_per_block(large) * 512 > 2**30
    assert num_affordable_blocks(large, 2**34) == 512


def test_sizes_that_cannot_work_name_their_numbers(config: EngineConfig) -> None:
    with pytest.raises(CapacityError, match=r"holds 60 tokens.*max_model_len 64 needs 16 blocks.*num_blocks gives"):
        num_affordable_blocks(replace(config, num_blocks=15), 2**30)
    with pytest.raises(CapacityError, match=r"Lower max_model_len, or raise cache_bytes \(`cache` of a recipe\)"):
        num_affordable_blocks(replace(config, num_blocks=None, cache_bytes=1000), 2**30)
    with pytest.raises(CapacityError, match=r"num_blocks asks for a KV cache of .* but only 0\.00 GiB are free"):
        num_affordable_blocks(config, 1000)


def test_weights_larger_than_memory_are_refused_before_loading(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.worker.available_bytes", lambda device: 1000)
    seen: list[int] = []
    with pytest.raises(CapacityError, match=r"weights of rank 0 take 0\.00 GiB in float64"):
        Worker(config).start(lambda done, total: seen.append(done))
    assert not seen


# --- the inline executor ----------------------------------------------------------------------------------------


async def test_inline_executor_runs_steps_in_order(config: EngineConfig, expected: list[list[int]]) -> None:
    executor = InlineExecutor(config)
    capacity = await asyncio.to_thread(executor.start)
    assert capacity.num_blocks == NUM_BLOCKS
    outputs = await asyncio.gather(*(executor.execute(batch) for batch in scripted_steps()))
    assert [output.token_ids.tolist() for output in outputs] == expected
    assert [output.step for output in outputs] == list(range(len(expected)))
    executor.close()
    executor.close()
    with pytest.raises(EngineDeadError, match="closed"):
        await executor.execute(scripted_steps()[0])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nanoserve-rank-0")]


async def test_a_failing_step_ends_the_executor(config: EngineConfig) -> None:
    """A block that does not exist: the step's error is the cause, and no later step runs."""
    executor = InlineExecutor(config)
    await asyncio.to_thread(executor.start)
    steps = scripted_steps()
    broken = replace(steps[0], block_updates=steps[0].block_updates + np.array([0, 0, 10_000], np.int32))
    results = await asyncio.gather(executor.execute(broken), executor.execute(steps[1]), return_exceptions=True)
    assert all(isinstance(result, EngineDeadError) for result in results)
    assert "Rank 0 failed in step 0" in str(results[0])
    assert isinstance(results[0].__cause__, IndexError | RuntimeError)  # type: ignore[union-attr]
    with pytest.raises(EngineDeadError, match="step 0"):
        await executor.execute(steps[1])
    executor.close()


def test_errors_of_the_start_keep_their_type(config: EngineConfig, tmp_path: Path) -> None:
    executor = InlineExecutor(replace(config, checkpoint=tmp_path))
    with pytest.raises(CheckpointError):
        executor.start()
    executor.close()
    with pytest.raises(ConfigError, match="one rank"):
        InlineExecutor(replace(config, tensor_parallel=2))


def test_what_steps_take_is_not_the_caches(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(replace(config, num_blocks=NUM_BLOCKS))
    worker._step_bytes = 1000
    cache_bytes = NUM_BLOCKS * bytes_per_block(config)
    monkeypatch.setattr("engine.worker.available_bytes", lambda device: cache_bytes + 1000)
    assert worker._agree_on_blocks(torch.device("cpu")) == NUM_BLOCKS
    monkeypatch.setattr("engine.worker.available_bytes", lambda device: cache_bytes + 999)
    with pytest.raises(CapacityError, match="at most 39 blocks fit"):
        worker._agree_on_blocks(torch.device("cpu"))
