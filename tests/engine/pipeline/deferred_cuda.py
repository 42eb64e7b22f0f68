"""`DeferredCuda`: the few things of torch.cuda that streams need, without a device. Imported by tests.

Work given to a stream is kept, and run later in any order that streams and events allow, drawn by the test: what real
streams may do, they do here. For every piece of work it is also known what must have ended before it begins.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

DEVICE = torch.device("cuda", 0)
NUM_UNITS = 132
Work = Callable[[], object]


@dataclass
class _Record:
    """A moment of a stream, told by an event."""

    known: frozenset[int]
    is_reached: bool = False
    reached_at: int = 0


@dataclass
class _Wait:
    record: _Record


@dataclass(eq=False)
class DeferredStream:
    """`known`: the numbers of the works that have ended before whatever is queued next."""

    cuda: "DeferredCuda"
    name: str
    known: set[int] = field(default_factory=set)
    queue: list[_Record | _Wait | Work] = field(default_factory=list)
    cuda_stream: int = 0

    def wait_event(self, event: "DeferredEvent") -> None:
        assert event.record_of is not None, "waiting for an event that was never recorded"
        self.known |= event.record_of.known
        self.queue.append(_Wait(event.record_of))

    def synchronize(self) -> None:
        self.cuda.settle(lambda count: 0)

    def wait_stream(self, other: "DeferredStream") -> None:
        event = DeferredEvent()
        event.record(other)
        self.wait_event(event)


class DeferredEvent:
    """Waiting for it means waiting for its latest record at that time."""

    num_made = 0

    def __init__(self, enable_timing: bool = False) -> None:
        type(self).num_made += 1
        self.record_of: _Record | None = None

    def record(self, stream: DeferredStream) -> None:
        self.record_of = _Record(frozenset(stream.known))
        stream.queue.append(self.record_of)

    def elapsed_time(self, later: "DeferredEvent") -> float:
        """Every work takes a millisecond, one after the other."""
        assert self.record_of is not None and self.record_of.is_reached
        assert later.record_of is not None and later.record_of.is_reached
        return later.record_of.reached_at - self.record_of.reached_at


class DeferredCuda:
    """`before[i]`: the works that have surely ended when work i begins; `stream_of[i]`: the stream it is on."""

    def __init__(self) -> None:
        self.main = DeferredStream(self, "main")
        self.current = self.main
        self.streams = [self.main]
        self.before: list[frozenset[int]] = []
        self.stream_of: list[str] = []
        self.num_done = 0

    def make_stream(self, device: object, priority: int = 0) -> DeferredStream:
        assert device == DEVICE
        self.streams.append(DeferredStream(self, "high" if priority < 0 else "side"))
        return self.streams[-1]

    @contextmanager
    def stream(self, stream: DeferredStream | None) -> Iterator[None]:
        """As torch.cuda.stream: None changes nothing."""
        before = self.current
        self.current = stream or before
        try:
            yield
        finally:
            self.current = before

    def queue(self, work: Work) -> None:
        """Launch work on the current stream."""
        number = len(self.before)
        self.before.append(frozenset(self.current.known))
        self.stream_of.append(self.current.name)
        self.current.known.add(number)
        self.current.queue.append(work)

    def settle(self, choose: Callable[[int], int]) -> None:
        """Run everything; `choose(n)` picks one of the n streams that can go on."""
        while ready := [stream for stream in self.streams if stream.queue and not _is_blocked(stream)]:
            entry = ready[choose(len(ready))].queue.pop(0)
            if isinstance(entry, _Record):
                entry.is_reached, entry.reached_at = True, self.num_done
            elif not isinstance(entry, _Wait):
                entry()
                self.num_done += 1
        assert not any(stream.queue for stream in self.streams), "streams wait for each other"


def _is_blocked(stream: DeferredStream) -> bool:
    entry = stream.queue[0]
    return isinstance(entry, _Wait) and not entry.record.is_reached


@contextmanager
def deferred_cuda() -> Iterator[DeferredCuda]:
    """torch.cuda's streams and events are these."""
    cuda = DeferredCuda()
    DeferredEvent.num_made = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", cuda.make_stream)
        patch.setattr(torch.cuda, "Event", DeferredEvent)
        patch.setattr(torch.cuda, "stream", cuda.stream)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: cuda.current)
        patch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=NUM_UNITS)
        )
        yield cuda


@dataclass
class RecordedGraphs:
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
        self, graph: "RecordedGraph", *, pool: object, stream: DeferredStream, capture_error_mode: str
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


class RecordedGraph:
    num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1


@contextmanager
def recorded_graphs(cuda: DeferredCuda) -> Iterator[RecordedGraphs]:
    """What captures ask of torch.cuda, too."""
    graphs = RecordedGraphs(cuda)
    with pytest.MonkeyPatch.context() as patch:
        for name, fake in {
            "graph_pool_handle": graphs.graph_pool_handle,
            "graph": graphs.graph,
            "CUDAGraph": RecordedGraph,
            "get_sync_debug_mode": lambda: graphs.sync_mode,
            "set_sync_debug_mode": graphs.set_sync_debug_mode,
            "synchronize": lambda device=None: graphs.log.append("synchronize"),
        }.items():
            patch.setattr(torch.cuda, name, fake)
        patch.setattr(DeferredStream, "device", DEVICE, raising=False)
        yield graphs
