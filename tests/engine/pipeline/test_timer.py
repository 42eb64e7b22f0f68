"""`HostTimer`; `CudaTimer` without a device: what it captures, on which streams it launches, and what it keeps."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from engine.pipeline.timer import CudaTimer, HostTimer, Load
from tests.engine.pipeline.deferred_cuda import DEVICE, DeferredCuda, DeferredStream, deferred_cuda


class Graphs:
    """Graphs that were captured: in which pool and mode, and how many of them live."""

    def __init__(self, cuda: DeferredCuda) -> None:
        self.cuda = cuda
        self.num_pools = 0
        self.settings: list[tuple[int, str]] = []
        self.alive: weakref.WeakSet[Graph] = weakref.WeakSet()

    def make(self) -> "Graph":
        graph = Graph(self.cuda)
        self.alive.add(graph)
        return graph

    def make_pool(self) -> int:
        self.num_pools += 1
        return self.num_pools

    @contextmanager
    def capture(self, graph: "Graph", *, pool: int, stream: DeferredStream, capture_error_mode: str) -> Iterator[None]:
        self.settings.append((pool, capture_error_mode))
        with self.cuda.stream(stream):
            yield


class Graph:
    def __init__(self, cuda: DeferredCuda) -> None:
        self._cuda = cuda

    def replay(self) -> None:
        self._cuda.queue(lambda: None)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    with deferred_cuda() as cuda:
        graphs = Graphs(cuda)
        for name, fake in {
            "current_device": lambda: DEVICE.index,
            "graph_pool_handle": graphs.make_pool,
            "graph": graphs.capture,
            "CUDAGraph": graphs.make,
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": lambda mode: None,
            "synchronize": lambda device=None: cuda.settle(lambda count: 0),
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(DeferredStream, "device", DEVICE, raising=False)
        ones = torch.ones
        monkeypatch.setattr(torch, "ones", lambda *size, device: ones(1))
        yield graphs


def load(runs: list[object]) -> Load:
    """A load whose calls are noted; `runs` lives as long as its graph, which keeps the function."""
    return Load(lambda: runs.append(None))


def test_a_graph_and_what_it_reads_go_with_their_load(graphs: Graphs) -> None:
    class Memory(list[object]):
        pass

    timer = CudaTimer()
    first, second = load(Memory()), load([])
    for _ in range(3):
        timer.seconds(first)
        timer.together(first, 2, second, 1)
    assert len(graphs.alive) == len(graphs.settings) == 2, "one for each load and side"
    memory = Memory()
    reference = weakref.ref(memory)
    third = load(memory)
    del memory
    timer.seconds(third)
    timer.together(second, 1, third, 1)
    assert len(graphs.alive) == 5 and reference() is not None
    del third
    gc.collect()
    assert len(graphs.alive) == 3 and reference() is None
    del first, second
    gc.collect()
    assert len(graphs.alive) == 0


def test_captures_leave_other_threads_alone_and_share_memory_only_in_turn(graphs: Graphs) -> None:
    timer = CudaTimer()
    loads = [load([]) for _ in range(3)]
    for one in loads:
        timer.seconds(one)
    timer.together(loads[0], 1, loads[1], 1)
    assert graphs.settings == [(1, "thread_local")] * 3 + [(2, "thread_local")]


def test_a_load_is_captured_once_and_then_only_launched(graphs: Graphs) -> None:
    timer = CudaTimer()
    runs: list[object] = []
    measured = load(runs)
    seconds: Callable[[], float] = lambda: timer.seconds(measured)  # noqa: E731
    assert [seconds() for _ in range(4)] == [pytest.approx(1e-3)] * 4, "a work takes a millisecond here"
    assert len(runs) == 3, "twice before the capture, and in it"


def test_two_loads_are_launched_on_streams_of_their_own(graphs: Graphs) -> None:
    timer = CudaTimer()
    timer.together(load([]), 3, load([]), 2)
    works = list(zip(graphs.cuda.stream_of, graphs.cuda.before, strict=True))
    assert len(works) == 5
    ahead = [sorted(before & set(range(5))) for _, before in works]
    assert ahead == [[], [0], [0, 1], [], [3]], "each stream in its own order, beside the other"


def test_on_a_host_a_collective_is_timed_behind_another(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, runs = [0.0], list[float]()
    monkeypatch.setattr("engine.pipeline.timer.time.perf_counter", lambda: clock[0])

    def run() -> None:
        clock[0] += 1.0 if not runs else 3.0  # the first is let through in a burst
        runs.append(clock[0])

    assert HostTimer().seconds(Load(run, lambda: None)) == 3.0
    assert len(runs) == 2
    runs.clear()
    assert HostTimer().seconds(Load(run)) == 1.0
    assert len(runs) == 1
