"""What is measured before a GPU serves: which operations, at which sizes, and that nothing of it stays behind."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.batch import Batch
from engine.device_probe import DeviceProbe
from engine.device_times import StepPart
from engine.gpu_preparation import GpuPreparation
from engine.kv_cache import KVCache
from engine.layers.norm import RMSNorm
from engine.model_config import Architecture
from engine.model_runner import ModelRunner
from engine.models import build_model
from engine.operation import Operation
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.timer import GraphTimer
from engine.step_work import StepWork
from engine.tensor_parallel import TensorParallel
from tests.engine.batch_script import BatchScript
from tests.engine.gpu_case import GREEDY, NUM_BLOCKS, PROMPTS, config_of, runner_of
from tests.engine.pipeline.deferred_cuda import DEVICE as CUDA
from tests.engine.pipeline.deferred_cuda import RecordedGraph, deferred_cuda, recorded_graphs

pytest.importorskip("triton")


@dataclass
class _CountingTimer:
    """Runs once; a call of an operation takes a millisecond, and each of its tokens a microsecond."""

    calls: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    runs: list[Counter[str]] = field(default_factory=list)

    def seconds(self, run: Callable[[], object]) -> float:
        self.calls, self.tokens = Counter(), 0
        run()
        self.runs.append(self.calls.copy())
        return 1e-3 * self.calls.total() + 1e-6 * self.tokens

    def called(self, operation: Operation, result: Any) -> Any:
        self.calls[type(operation).__name__] += 1
        self.tokens += len(result[0] if isinstance(result, tuple) else result)
        return result


def padded_runner(architecture: Architecture, *, kernels: bool = False) -> ModelRunner:
    """Without kernels plain torch stands for them: the interpreter takes a second for each run."""
    runner = runner_of(config_of(architecture, max_batch_tokens=8), kernels=kernels)
    if not kernels:
        runner._model.lm_head.draw = lambda logits_KV, plan, sections: logits_KV.argmax(-1)
    runner.pad_steps(None)
    return runner


def counting(runner: ModelRunner, timer: _CountingTimer) -> None:
    """Have every operation of the model tell the timer of its calls."""
    for module in runner._model.modules():
        if isinstance(module, Operation):
            plain = module.forward

            def forward(*inputs: Any, _plain: Any = plain, _module: Operation = module, **options: Any) -> Any:
                return timer.called(_module, _plain(*inputs, **options))

            module.forward = forward
            if isinstance(module, RMSNorm) and module.of_sum is not None:
                both = module.of_sum

                def of_sum(*inputs: Any, _plain: Any = both, _module: Operation = module) -> Any:
                    return timer.called(_module, _plain(*inputs))

                module.of_sum = of_sum


def probe_of(runner: ModelRunner, timer: Any) -> DeviceProbe:
    assert runner.padded is not None
    return DeviceProbe(
        runner._config,
        runner._model,
        runner.pipeline,
        runner._kv_cache,
        timer,
        most_rows=runner.padded.most_rows,
        gather=runner.padded.gather,
    )


@pytest.fixture(scope="module")
def runner() -> Iterator[ModelRunner]:
    yield padded_runner(Architecture.LLAMA)


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_each_part_is_run_by_itself_over_all_layers(kernels: bool) -> None:
    runner = padded_runner(Architecture.LLAMA, kernels=kernels)
    timer = _CountingTimer()
    counting(runner, timer)
    probe = probe_of(runner, timer)
    probe.measure_alone()
    probe.measure_together()
    products = {"QKVLinear": 2, "RowParallelLinear": 4, "ColumnParallelLinear": 2}
    rest = {"EmbeddingShard": 1, "RMSNorm": 4, "RotaryAndKVWrite": 2, "SiluAndMul": 2}
    attention = {"DecodeAttention": 2, "PrefillAttention": 2}
    found = [dict(+run) for run in timer.runs]
    for run in found:
        run.pop("JoinTokens", None)
    assert found[:4] == [products, rest] * 2, "of 1 and 8 rows"
    assert found[4:7] == [attention] * 3, "of 1 and 6 decodes and of 8 tokens of prompts, with one context"
    assert found[7:] == [{"ColumnParallelLinear": 1}, {"RMSNorm": 1}] * 2, "of 1 and 6 drawn rows"
    times = probe.times()
    assert set(times.laws) == set(StepPart) - {StepPart.COLLECTIVES, StepPart.HEAD_COLLECTIVE}
    assert times.laws[StepPart.PRODUCTS].seconds(8, 0) == pytest.approx(8e-3 + 8 * 8e-6)
    assert times.laws[StepPart.PRODUCTS].seconds(5, 0) == pytest.approx(8e-3 + 8 * 5e-6), "between two sizes"
    assert times.laws[StepPart.HEAD_PRODUCT].seconds(6, 0) == pytest.approx(1e-3 + 6e-6)
    assert not any(tensor.any() for tensor in (*runner._kv_cache.keys, *runner._kv_cache.values))


@pytest.mark.parametrize("architecture", [Architecture.MISTRAL, Architecture.MIXTRAL])
def test_other_layers_are_measured_too(architecture: Architecture) -> None:
    """Windows, of which decodes see no more; and experts, which count as products."""
    runner = padded_runner(architecture)
    timer = _CountingTimer()
    probe = probe_of(runner, timer)
    probe.measure_alone()
    times = probe.times()
    assert times.windows == ((9, 9) if architecture is Architecture.MISTRAL else (None, None))
    seen = {sample.context for sample in probe._samples[StepPart.DECODE_ATTENTION]}
    assert max(seen) == (9 if architecture is Architecture.MISTRAL else 64)


def test_collectives_are_measured_with_the_other_ranks_and_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sums a layer and one of the embedding, of zeros that never grow; and the head's parts."""
    summed: list[float] = []
    gathered: list[int] = []

    def all_reduce(group: TensorParallel, partial: Tensor) -> Tensor:
        summed.append(float(partial.abs().sum()))
        return partial

    def all_gather(group: TensorParallel, shard: Tensor) -> Tensor:
        gathered.append(len(shard))
        return torch.cat((shard, shard), dim=-1)

    monkeypatch.setattr(TensorParallel, "all_reduce", all_reduce)
    monkeypatch.setattr(TensorParallel, "all_gather", all_gather)
    config = replace(config_of(Architecture.LLAMA, max_batch_tokens=8), tensor_parallel=2)
    model = build_model(config.model, TensorParallel(rank=1, size=2), torch.float32, torch.device("cpu"))
    for parameter in model.parameters():
        parameter.normal_()
    pipeline = Pipeline(model, config.model.hidden_size)
    cache = KVCache.allocate(config, NUM_BLOCKS, torch.device("cpu"))
    model.lm_head.draw = lambda logits_KV, plan, sections: logits_KV
    probe = DeviceProbe(
        config, model, pipeline, cache, _CountingTimer(), most_rows=8, gather=lambda num_tokens: None
    )  # fmt: skip
    probe.measure_alone()
    assert not summed and not gathered
    probe.measure_together()
    assert summed == [0.0] * 2 * (1 + 2 * config.model.num_layers), "at two sizes"
    assert gathered == [1, 6]
    assert set(probe.times().laws) == set(StepPart)
    assert not any(tensor.any() for tensor in (*cache.keys, *cache.values))


def test_steps_are_told_apart_without_waiting_for_the_device(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts are computed when the step's time is known, and add up to it."""
    probe = probe_of(runner, _CountingTimer())
    monkeypatch.setattr(probe, "_measure_rows", lambda: probe._add(StepPart.PRODUCTS, 8, lambda: None))
    probe._timer = type("Fixed", (), {"seconds": lambda self, run: 2e-3})()
    probe.measure_alone()
    monkeypatch.setattr(runner, "device_times", probe.times())
    monkeypatch.setattr(runner, "padded", None)  # plain torch knows no padding
    shared: list[Batch] = []
    original = StepWork.of

    def noting(batch: Batch, *rest: Any) -> StepWork:
        shared.append(batch)
        return original(batch, *rest)

    monkeypatch.setattr(StepWork, "of", noting)
    script = BatchScript(NUM_BLOCKS, 16)
    script.admit(0, PROMPTS[3], GREEDY)
    pending = runner.launch(script.step(prefills=[(0, 3)]))
    assert not shared
    output = pending.wait()
    assert len(shared) == 1 and output.times is not None
    assert output.times.gemm_seconds > 0 and output.times.attention_seconds > 0
    assert output.times.exposed_network_seconds == 0
    assert output.times.gemm_seconds + output.times.attention_seconds < output.device_seconds


def test_on_a_device_each_part_is_a_graph_between_events(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch is asked for it: three calls, one of them recorded, then four launches; a launch is a millisecond."""
    with deferred_cuda() as cuda, recorded_graphs(cuda) as graphs:
        monkeypatch.setattr(RecordedGraph, "replay", lambda self: cuda.queue(lambda: None))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: cuda.settle(lambda count: 0))
        probe = probe_of(runner, GraphTimer(CUDA))
        probe.measure_alone()
        times = probe.times()
        num_parts = sum(map(len, probe._samples.values()))
        assert graphs.log == ["begin", "end"] * num_parts and graphs.num_pools == 1
        assert len(cuda.before) == 4 * num_parts
        assert {sample.seconds for samples in probe._samples.values() for sample in samples} == {1e-3}
        assert times.laws[StepPart.PRODUCTS].seconds(8, 0) == 1e-3


@pytest.mark.parametrize("refuses", [False, True])
def test_a_rank_that_cannot_measure_serves_without(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    def measure(probe: DeviceProbe) -> None:
        if refuses:
            raise torch.OutOfMemoryError("No memory.\nNone.")

    told: list[str] = []
    monkeypatch.setattr("engine.gpu_preparation.GraphTimer", lambda device: None)
    monkeypatch.setattr("engine.gpu_preparation.free_device_memory", lambda: told.append("freed"))
    monkeypatch.setattr(DeviceProbe, "measure_alone", measure)
    monkeypatch.setattr(runner, "device_times", None)
    preparation = GpuPreparation(runner._config, runner, TensorParallel(), told.append)
    preparation.time_operations(runner._model, runner._kv_cache)
    assert (runner.device_times is None) == refuses
    assert told == ["nobody tells where the time of steps goes. No memory."] * refuses + ["freed"]
