"""`Timer`: how long something takes on a device, alone, and two things at the same time.

`HostTimer` reads the host's clock; beside what it computes, collectives fly in the library's own threads. `CudaTimer`
records events around captured graphs, so that launching costs nothing; two things run on two streams.

Alone, what computes is timed with cold caches: in a model every layer has weights and a KV cache of its own, which the
layers before have driven out. A collective's buffers were written just before, so for it nothing is driven out.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.tensor_parallel import Collective

# More than what the processor, or the GPU, keeps near it.
_HOST_CACHE_BYTES = 2**25
_CUDA_CACHE_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class Load:
    """Something to time. `start` is there for a collective: begin it and return what is then in flight."""

    run: Callable[[], object]
    start: Callable[[], Collective | None] | None = None


class Timer(Protocol):
    """Seconds on one device."""

    def seconds(self, load: Load) -> float:
        """One run from its beginning to its end, with nothing else on the device; cold unless it is a collective."""
        ...

    def together(self, first: Load, num_first: int, second: Load, num_second: int) -> tuple[float, float]:
        """Begin so many runs of both at once: the seconds until the last of `first`, and of `second`, has ended.

        A number of zero leaves that one out, for a comparison under the same conditions.
        """
        ...


class HostTimer:
    """On a CPU `second` must be a collective, because what computes takes turns on one lane."""

    def __init__(self) -> None:
        self._scratch = torch.ones(_HOST_CACHE_BYTES // 4)

    def seconds(self, load: Load) -> float:
        if load.start is None:
            self._scratch.sum()
        started = time.perf_counter()
        load.run()
        return time.perf_counter() - started

    def together(self, first: Load, num_first: int, second: Load, num_second: int) -> tuple[float, float]:
        assert second.start is not None
        ends: list[float] = []
        flights: list[Collective] = []
        started = time.perf_counter()
        for _ in range(num_second):
            flight = second.start()
            if flight is not None:
                flight.get_future().add_done_callback(lambda _: ends.append(time.perf_counter()))
                flights.append(flight)
        for _ in range(num_first):
            first.run()
        first_ended = time.perf_counter()
        for flight in flights:
            flight.wait()
        landed = time.perf_counter()  # a callback may still be on its way
        second_ended = max(ends) if len(ends) == len(flights) and ends else landed
        return first_ended - started, min(second_ended, landed) - started


class CudaTimer:
    """`seconds` may be given a stream that owns a part of the execution units."""

    def __init__(self) -> None:
        self._graphs: dict[int, tuple[Load, Callable[[], None]]] = {}
        self._streams = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._scratch = torch.ones(_CUDA_CACHE_BYTES // 4, device="cuda")

    def seconds(self, load: Load, stream: torch.cuda.Stream | None = None) -> float:
        replay = self._captured(load)
        if load.start is None:
            self._scratch.zero_()
        return self._run([(stream or self._streams[0], replay, 1)])[0]

    def together(self, first: Load, num_first: int, second: Load, num_second: int) -> tuple[float, float]:
        jobs = zip(self._streams, (first, second), (num_first, num_second), strict=True)
        ended = self._run([(stream, self._captured(load), count) for stream, load, count in jobs])
        return ended[0], ended[1]

    def _run(self, jobs: list[tuple[torch.cuda.Stream, Callable[[], None], int]]) -> list[float]:
        """The seconds from a common start to the end of each stream's runs."""
        torch.cuda.synchronize()
        started = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        started.record(jobs[0][0])
        ends: list[torch.cuda.Event] = []
        for stream, _, _ in jobs[1:]:
            stream.wait_event(started)
        for stream, replay, count in jobs:
            ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                for _ in range(count):
                    replay()
                ended.record(stream)
            ends.append(ended)
        torch.cuda.synchronize()
        return [float(started.elapsed_time(ended)) / 1000 for ended in ends]

    def _captured(self, load: Load) -> Callable[[], None]:
        """The load as a graph; kept, with the load itself, so that its identity stays its own."""
        if id(load) not in self._graphs:
            side = self._streams[0]
            with torch.cuda.stream(side):
                load.run()  # libraries initialise themselves outside a capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                load.run()
            self._graphs[id(load)] = (load, graph.replay)
        return self._graphs[id(load)][1]
