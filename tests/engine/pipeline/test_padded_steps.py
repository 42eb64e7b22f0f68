"""Padded steps draw the tokens that steps as large as their batches draw, from any bucket and any mix."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.batch import Batch, StepOutput
from engine.config import EngineConfig
from engine.gpu_preparation import GpuPreparation
from engine.model_config import Architecture
from engine.model_runner import ModelRunner
from engine.pipeline.capture import CaptureError, CaptureMemoryError, Captures
from engine.pipeline.padded_inputs import packed_step
from engine.pipeline.token_bucket import PaddedNanoBatch, TokenBucket
from engine.request import SamplingParams
from engine.tensor_parallel import TensorParallel
from tests.engine.batch_script import BatchScript
from tests.engine.gpu_case import GREEDY, NUM_BLOCKS, PROMPTS, answers, config_of, runner_of
from tests.engine.pipeline.deferred_cuda import DEVICE as CUDA
from tests.engine.pipeline.deferred_cuda import deferred_cuda, recorded_graphs

pytest.importorskip("triton")

SAMPLINGS = [
    GREEDY,
    SamplingParams(seed=1),
    SamplingParams(seed=2, top_p=0.9),
    SamplingParams(temperature=0, logprobs=1),
]


@dataclass
class _Recording:
    """Stands in for `Captures`: a graph computes again what was recorded, into the same result, from nothing new."""

    buckets: list[int] = field(default_factory=list)
    num_replays: int = 0

    def capture(self, run: Callable[[], Tensor]) -> "_Graph":
        result = run()
        self.buckets.append(len(result))
        return _Graph(self, run, result)


@dataclass
class _Graph:
    recording: _Recording
    run: Callable[[], Tensor]
    result: Tensor

    def replay(self) -> Tensor:
        self.recording.num_replays += 1
        return self.result.copy_(self.run())


def padded_runner(config: EngineConfig, captures: Any = None) -> ModelRunner:
    runner = runner_of(config, kernels=True)
    runner.pad_steps(captures)
    return runner


def launched(runner: ModelRunner, sizes: list[tuple[int, int]]) -> Callable[[Batch], StepOutput]:
    """Launches, and notes how many tokens each step had and how many rows it was padded by."""

    def launch(batch: Batch) -> StepOutput:
        output = runner.launch(batch).wait()
        sizes.append((batch.num_tokens, output.num_padding_tokens))
        return output

    return launch


@pytest.mark.parametrize(
    "architecture",
    [
        Architecture.LLAMA,
        Architecture.MIXTRAL,
        pytest.param(Architecture.MISTRAL, marks=pytest.mark.slow),
        pytest.param(Architecture.QWEN3, marks=pytest.mark.slow),
    ],
)
def test_padded_steps_draw_the_same_tokens(architecture: Architecture) -> None:
    config = config_of(architecture)
    plain: list[tuple[int, int]] = []
    padded: list[tuple[int, int]] = []
    expected = answers(config, launched(runner_of(config, kernels=False), plain), SAMPLINGS)
    assert answers(config, launched(padded_runner(config), padded), SAMPLINGS) == expected
    assert [size for size, _ in padded] == [size for size, _ in plain] and not any(padding for _, padding in plain)
    assert {size + padding for size, padding in padded} <= {1, 2, 4, 8, 16, 32, 40}
    assert any(padding for _, padding in padded)


@pytest.mark.slow
def test_graphs_are_captured_from_the_largest_and_serve_every_mix() -> None:
    """All recorded before the first batch is known, and on an untouched cache; nothing but graphs runs afterwards."""
    config = config_of(Architecture.LLAMA, max_batch_tokens=22)
    recording = _Recording()
    runner = padded_runner(config, recording)
    assert recording.buckets == [22, 16, 8, 4, 2, 1]
    assert not any(tensor.any() for tensor in runner._kv_cache.keys + runner._kv_cache.values)
    sizes: list[tuple[int, int]] = []
    plain = runner_of(config, kernels=False)
    expected = answers(config, lambda batch: plain.launch(batch).wait(), SAMPLINGS)
    assert answers(config, launched(runner, sizes), SAMPLINGS) == expected
    assert recording.num_replays == len(sizes)


def test_all_graphs_lie_in_one_pool() -> None:
    """As torch is asked for them."""
    runner = runner_of(config_of(Architecture.LLAMA, max_batch_tokens=6), kernels=True)
    with deferred_cuda() as cuda, recorded_graphs(cuda) as graphs:
        runner.pad_steps(Captures(CUDA))
        assert graphs.log == ["begin", "end"] * 4 and graphs.num_pools == 1
        assert len({pool for pool, _, _ in graphs.settings}) == 1
        script = BatchScript(NUM_BLOCKS, 16)
        script.admit(0, PROMPTS[3], GREEDY)
        assert runner.launch(script.step(prefills=[(0, 3)])).wait().num_padding_tokens == 1
        assert runner.padded is not None
        captured: dict[int, Any] = {size: step.run for size, step in runner.padded._whole.items()}
        replays = {size: replay.__self__._graph.num_replays for size, replay in captured.items()}
        assert replays == {1: 0, 2: 0, 4: 1, 6: 0}


@pytest.mark.parametrize(
    "error",
    [CaptureError("It waits."), CaptureMemoryError("It waits.\nFor memory."), RuntimeError("It waits.")],
    ids=["refused", "out of memory", "as torch says it"],
)
def test_a_model_that_cannot_be_captured_goes_on_without_graphs(error: Exception) -> None:
    class Refusing:
        def capture(self, run: object) -> None:
            raise error

    config = config_of(Architecture.LLAMA)
    runner = runner_of(config, kernels=True)
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.gpu_preparation.AgreedCaptures", lambda *_: Refusing())
        GpuPreparation(config, runner, TensorParallel(), told.append).capture_steps()
    assert runner.padded is None
    assert told == ["no step becomes a CUDA graph. It waits."]


def test_a_rank_without_memory_for_inputs_does_not_go_on_alone() -> None:
    """The others are in a capture then, and would take its next collective for their own."""

    def scarce(captures: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    config = config_of(Architecture.LLAMA)
    runner = runner_of(config, kernels=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.gpu_preparation.AgreedCaptures", lambda *_: None)
        patch.setattr(runner, "pad_steps", scarce)
        with pytest.raises(torch.OutOfMemoryError):
            GpuPreparation(config, runner, TensorParallel(), print).capture_steps()


def test_steps_that_no_bucket_holds_run_as_large_as_they_are() -> None:
    """More tokens than any bucket, and more chunks than one has room for."""
    config = config_of(Architecture.LLAMA)
    runner = padded_runner(config)
    assert runner.padded is not None
    runner.padded._sizes = (8,)
    runner.padded._whole[8].bucket = TokenBucket((PaddedNanoBatch(num_tokens=8, num_lanes=6, num_chunks=1),))
    script = BatchScript(NUM_BLOCKS, config.block_size)
    for row in (0, 1):
        script.admit(row, PROMPTS[3], GREEDY)
    padding = []
    for prefills in ([(0, 1)], [(0, 1), (1, 1)], [(1, 1)]):
        padding.append(runner.launch(script.step(prefills=prefills)).wait().num_padding_tokens)
    script.admit(2, list(range(9)), GREEDY)
    padding.append(runner.launch(script.step(prefills=[(2, 9)])).wait().num_padding_tokens)
    padding.append(runner.launch(script.step(decodes=[2])).wait().num_padding_tokens)
    assert padding == [7, 0, 7, 0, 7]


def test_padded_and_other_steps_follow_each_other() -> None:
    """Decodes that repeat, some of them padded and some not: neither goes on from what the other left."""
    config = config_of(Architecture.LLAMA)
    answered = []
    for kernels in (False, True):
        runner = runner_of(config, kernels=kernels)
        script = BatchScript(NUM_BLOCKS, config.block_size)
        for row, prompt in enumerate(PROMPTS[2:]):
            script.admit(row, prompt, SAMPLINGS[row])
        tokens = [runner.launch(script.step(prefills=[(0, 17), (1, 3)])).wait().token_ids.tolist()]
        if kernels:
            runner.pad_steps(None)
        padded = runner.padded
        for step in range(6):
            runner.padded = padded if step in (1, 4) else None
            tokens.append(runner.launch(script.step(decodes=[0, 1])).wait().token_ids.tolist())
        answered.append(tokens)
    assert answered[0] == answered[1]


def test_padding_goes_to_no_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.kernels.gpu.mixture_of_experts import mixture_of_experts

    told: list[tuple[int, int]] = []

    def noting(*arguments: Any, positions_T: Tensor, **options: Any) -> Tensor:
        told.append((len(positions_T), int((positions_T >= 0).sum())))
        return mixture_of_experts(*arguments, positions_T=positions_T, **options)

    monkeypatch.setattr("engine.gpu_operations.mixture_of_experts", noting)
    config = config_of(Architecture.MIXTRAL)
    runner = padded_runner(config)
    padded = runner.padded
    script = BatchScript(NUM_BLOCKS, config.block_size)
    script.admit(0, PROMPTS[3], GREEDY)
    script.admit(1, PROMPTS[1], GREEDY)
    runner.launch(script.step(prefills=[(0, 3)])).wait()
    runner.launch(script.step(decodes=[0], prefills=[(1, 1)])).wait()
    runner.padded = None
    runner.launch(script.step(decodes=[0, 1])).wait()
    num_layers = config.model.num_layers
    assert padded is not None and told[:num_layers] == [(4, 3)] * num_layers
    assert set(told[num_layers:]) == {(2, 2)}


def batch_of_mixed() -> Batch:
    """Two decodes, a prompt of three tokens and two more of another."""
    return Batch(
        step=0,
        admissions=(),
        block_updates=np.zeros((0, 3), np.int32),
        rows=np.array([5, 2, 7, 1], np.int32),
        starts=np.array([9, 4, 0, 30], np.int32),
        counts=np.array([1, 1, 3, 2], np.int32),
        num_decodes=2,
        sampled=np.zeros(0, np.int32),
    )


def packed(bucket: TokenBucket) -> tuple[list[int], list[list[int]]]:
    """The rows of the tokens of `batch_of_mixed`, and what travels, section by section."""
    batch = batch_of_mixed()
    dealt = bucket.dealt(batch)
    assert dealt is not None
    integers, places = packed_step(
        bucket, batch, dealt, np.array([5, 2, 7, 7, 7, 1, 1]), np.array([9, 4, 0, 1, 2, 30, 31])
    )
    sizes = [bucket.num_tokens] * 2
    for each in bucket.nano_batches:
        sizes += [each.num_lanes] * 2 + [each.num_chunks, each.num_chunks + 1, each.num_chunks]
    return places.tolist(), [part.tolist() for part in np.split(integers, np.cumsum(sizes)[:-1])]


def test_what_travels_says_what_is_there_and_what_is_not() -> None:
    places, (rows, positions, lane_rows, lane_lengths, chunk_rows, starts, lengths) = packed(
        TokenBucket((PaddedNanoBatch(num_tokens=8, num_lanes=3, num_chunks=3),))
    )
    assert places == [0, 1, 2, 3, 4, 5, 6]
    assert rows == [5, 2, 7, 7, 7, 1, 1, 0] and positions == [9, 4, 0, 1, 2, 30, 31, -1]
    assert lane_rows == [5, 2, 0] and lane_lengths == [10, 5, -1]
    assert chunk_rows == [7, 1, 0] and starts == [2, 5, 7, 7] and lengths == [3, 32, 0]


def test_each_nano_batch_is_told_its_own_and_a_chunk_can_lie_in_two() -> None:
    """The prompt of three tokens: two of them in the first, and one that meets them in the second."""
    bucket = TokenBucket(tuple(PaddedNanoBatch(num_tokens=num_rows, num_lanes=2, num_chunks=2) for num_rows in (3, 5)))
    places, (rows, positions, *nano_batches) = packed(bucket)
    assert places == [0, 3, 1, 2, 4, 5, 6]
    assert rows == [5, 7, 7, 2, 7, 1, 1, 0] and positions == [9, 0, 1, 4, 2, 30, 31, -1]
    assert nano_batches[:5] == [[5, 0], [10, -1], [7, 0], [1, 3, 3], [2, 0]]
    assert nano_batches[5:] == [[2, 0], [5, -1], [7, 1], [1, 2, 4], [3, 32]]


def test_lanes_where_no_chunk_can_be_get_zeros() -> None:
    bucket = TokenBucket((PaddedNanoBatch(num_tokens=4, num_lanes=4, num_chunks=0),))
    batch = replace(batch_of_mixed(), rows=np.array([5, 2], np.int32), starts=np.array([9, 4]), counts=np.array([1, 1]))
    dealt = bucket.dealt(batch)
    assert dealt is not None and bucket.dealt(batch_of_mixed()) is None
    integers, _ = packed_step(bucket, batch, dealt, np.array([5, 2]), np.array([9, 4]))
    assert integers.tolist()[12:16] == [10, 5, 0, 0]
