from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from engine.pipeline.capture import CaptureError, Captures
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
            import warnings

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

    with pytest.raises(RuntimeError, match="^shapes differ$") as caught:
        Captures(DEVICE).capture(run)
    assert not isinstance(caught.value, CaptureError)
    assert calls == [0, 2] and graphs.sync_mode == 0


def test_what_the_graph_reads_lives_as_long_as_the_graph(graphs: _Graphs) -> None:
    import gc
    import weakref

    class Input:
        pass

    def make() -> tuple[Any, "weakref.ref[Input]"]:
        value = Input()
        return Captures(DEVICE).capture(lambda: id(value)), weakref.ref(value)

    captured, reference = make()
    gc.collect()
    assert reference() is not None
    del captured
    gc.collect()
    assert reference() is None


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
