import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.batch_shape import BatchShape
from engine.config import EngineConfig
from engine.model_config import Architecture, DType
from engine.models import build_model
from engine.pipeline.capture import CaptureError, Captures
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.trial import MIN_ROUNDS, Contestant, Trial
from engine.random_checkpoint import sized_config
from engine.tensor_parallel import TensorParallel
from tests.engine.pipeline.deferred_cuda import DEVICE, DeferredCuda, DeferredStream, deferred_cuda


@dataclass
class _Graphs:
    """What captures ask of torch.cuda, noted; a graph is what was called while it was open."""

    cuda: DeferredCuda
    log: list[str] = field(default_factory=list)
    settings: list[tuple[object, object, object]] = field(default_factory=list)
    num_pools: int = 0
    sync_mode: int = 0

    def graph_pool_handle(self) -> tuple[str, int]:
        self.num_pools += 1
        return ("pool", self.num_pools)

    @contextmanager
    def graph(
        self, graph: "_Graph", *, pool: object, stream: DeferredStream, capture_error_mode: str
    ) -> Iterator[None]:
        self.settings.append((pool, stream, capture_error_mode))
        self.log.append("begin")
        with self.cuda.stream(stream):
            yield
        self.log.append("end")

    def set_sync_debug_mode(self, mode: int | str) -> None:
        if mode == "error":
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
        self.sync_mode = 2 if mode == "error" else int(mode)

    def wait_for_the_device(self) -> None:
        """What `Tensor.item` does."""
        if self.sync_mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")


class _Graph:
    num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Graphs]:
    with deferred_cuda() as cuda:
        graphs = _Graphs(cuda)
        for name, fake in {
            "graph_pool_handle": graphs.graph_pool_handle,
            "graph": graphs.graph,
            "CUDAGraph": _Graph,
            "get_sync_debug_mode": lambda: graphs.sync_mode,
            "set_sync_debug_mode": graphs.set_sync_debug_mode,
            "synchronize": lambda device=None: graphs.log.append("synchronize"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(DeferredStream, "device", DEVICE, raising=False)
        yield graphs


def _run(graphs: _Graphs, result: object = "result") -> Callable[[], object]:
    def run() -> object:
        graphs.log.append(f"run on {graphs.cuda.current.name}, sync mode {graphs.sync_mode}")
        graphs.cuda.queue(lambda: None)
        return result

    return run


def test_two_runs_warm_up_on_the_stream_that_is_captured(graphs: _Graphs) -> None:
    graphs.cuda.queue(lambda: None)
    captured = Captures(DEVICE).capture(_run(graphs))
    assert graphs.log == [
        "run on side, sync mode 0",
        "run on side, sync mode 2",
        "begin",
        "run on side, sync mode 0",
        "end",
    ]
    assert all(0 in graphs.cuda.before[number] for number in (1, 2)), "behind what the caller had launched"
    assert graphs.cuda.main.known >= {1, 2}, "the caller goes on behind the warm-up"
    assert captured.replay() == captured.replay() == "result"
    assert captured._graph.num_replays == 2  # type: ignore[attr-defined]


def test_captures_share_a_pool_and_a_stream_and_leave_other_threads_alone(graphs: _Graphs) -> None:
    captures = Captures(DEVICE)
    captures.capture(_run(graphs))
    captures.capture(_run(graphs))
    first, second = graphs.settings
    assert first == second
    assert first[0] == ("pool", 1) and graphs.num_pools == 1 and first[2] == "thread_local"


def test_a_run_that_waits_for_the_device_is_refused_before_anything_is_recorded(graphs: _Graphs) -> None:
    def run() -> None:
        graphs.cuda.queue(lambda: None)
        graphs.wait_for_the_device()

    with pytest.raises(CaptureError, match="cannot become a CUDA graph, because it waits for the device"):
        Captures(DEVICE).capture(run)
    assert graphs.log == ["synchronize"]
    assert graphs.sync_mode == 0
    assert graphs.cuda.current is graphs.cuda.main


def test_other_errors_stay_what_they_are(graphs: _Graphs) -> None:
    calls: list[int] = []

    def run() -> None:
        calls.append(graphs.sync_mode)
        if len(calls) == 2:
            raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ") as caught:
        Captures(DEVICE).capture(run)
    assert not isinstance(caught.value, CaptureError)
    assert calls == [0, 2] and graphs.sync_mode == 0


def test_what_the_graph_reads_lives_as_long_as_the_graph(graphs: _Graphs) -> None:
    class Input:
        pass

    def make() -> tuple[Any, weakref.ref[Input]]:
        value = Input()
        return Captures(DEVICE).capture(lambda: id(value)), weakref.ref(value)

    captured, reference = make()
    gc.collect()
    assert reference() is not None
    del captured
    gc.collect()
    assert reference() is None


class _ReplayingCaptures:
    """Stands in for `Captures` where there is no device."""

    def __init__(self, refuses: bool) -> None:
        self.refuses = refuses
        self.num_captured = self.num_replayed = 0

    def capture(self, run: Callable[[], Any]) -> Any:
        if self.refuses:
            raise CaptureError("It waits.")
        self.num_captured += 1
        run()
        return self

    def replay(self) -> None:
        self.num_replayed += 1


@pytest.mark.parametrize("refuses", [False, True])
def test_a_trial_captures_every_contestant_once_and_launches_what_cannot_be_captured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, refuses: bool
) -> None:
    model_config = sized_config(Architecture.LLAMA, hidden_size=32, intermediate_size=48, vocab_size=64)
    config = EngineConfig(model=model_config, checkpoint=tmp_path, dtype=DType.FLOAT32, max_model_len=64)
    model = build_model(model_config, TensorParallel(), torch.float32, torch.device("cpu"))
    pipeline = Pipeline(model, model_config.hidden_size)
    trial = Trial(config, pipeline, TensorParallel())
    captures = _ReplayingCaptures(refuses)
    trial._captures = captures  # type: ignore[assignment]
    contestants = [Contestant(pipeline.sequential, overlaps) for overlaps in (False, True)]
    shape = BatchShape(num_decodes=3, num_prefills=5, decode_context=8, prefill_context=4)
    timings = trial.run(contestants, shape, 0.0)
    assert [len(timing.rounds) for timing in timings] == [MIN_ROUNDS] * 2
    assert captures.num_captured == (0 if refuses else 2)
    assert captures.num_replayed == (0 if refuses else 2 * (MIN_ROUNDS + 1))
    assert [record.message for record in caplog.records] == ["It waits. It is timed as it is launched."] * 2 * refuses


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
def test_a_replayed_graph_computes_on_what_lies_in_its_inputs() -> None:
    device = torch.device("cuda")
    captures = Captures(device)
    numbers = torch.ones(64, device=device)
    other = torch.ones(64, device=device)
    twice = captures.capture(lambda: numbers * 2)
    thrice = captures.capture(lambda: other * 3)
    numbers.fill_(5)
    assert twice.replay().tolist() == [10.0] * 64
    assert thrice.replay().tolist() == [3.0] * 64


@pytest.mark.gpu
@needs_gpu
def test_item_is_refused_and_the_device_goes_on() -> None:
    device = torch.device("cuda")
    captures = Captures(device)
    numbers = torch.ones(64, device=device)
    with pytest.raises(CaptureError):
        captures.capture(lambda: numbers.sum().item())
    assert captures.capture(lambda: numbers.sum()).replay().item() == 64
