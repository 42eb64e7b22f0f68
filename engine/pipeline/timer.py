"""`Timer`: how long something takes on a device, alone, and two things at the same time.

`HostTimer` reads the host's clock; beside what it computes, collectives fly in the library's own threads. `CudaTimer`
records events around captured graphs, so that launching costs nothing; two things run on two streams. `GraphTimer`
is for what is large enough to leave no cache warm, and timed once.

Alone, what computes is timed with cold caches: in a model every layer has weights and a KV cache of its own, which the
layers before have driven out. A collective's buffers were written just before, so for it nothing is driven out; but
`HostTimer` times it behind another one, because links that are limited by token buckets let a first one through in a
burst.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol
from weakref import WeakKeyDictionary

import torch

from engine.pipeline.capture import CapturedRun, Captures
from engine.tensor_parallel import Collective

# More than what the processor, or the GPU, keeps near it.
_HOST_CACHE_BYTES = 2**25
_CUDA_CACHE_BYTES = 2**28
_NUM_REPLAYS = 3


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Load:
    """Something to time. `start` is there for a collective: begin it and return what is then in flight.

    A timer may keep something for each load, which goes with it; every load is equal only to itself.
    """

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
        else:
            load.run()
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
    """A load may branch off to other streams, as long as it joins the current one again."""

    def __init__(self) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        # Two of each: graphs that run at the same time must not share memory.
        self._sides = (_Side(device), _Side(device))
        self._scratch = torch.ones(_CUDA_CACHE_BYTES // 4, device="cuda")

    def seconds(self, load: Load) -> float:
        side = self._sides[0]
        captured = side.captured(load)
        if load.start is None:
            self._scratch.zero_()
        return self._run([(side.stream, captured, 1)])[0]

    def together(self, first: Load, num_first: int, second: Load, num_second: int) -> tuple[float, float]:
        jobs = zip(self._sides, (first, second), (num_first, num_second), strict=True)
        ended = self._run([(side.stream, side.captured(load), count) for side, load, count in jobs])
        return ended[0], ended[1]

    def _run(self, jobs: list[tuple[torch.cuda.Stream, CapturedRun[object], int]]) -> list[float]:
        """The seconds from a common start to the end of each stream's runs."""
        torch.cuda.synchronize()
        started = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        started.record(jobs[0][0])
        ends: list[torch.cuda.Event] = []
        for stream, _, _ in jobs[1:]:
            stream.wait_event(started)
        for stream, captured, count in jobs:
            ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                for _ in range(count):
                    captured.replay()
                ended.record(stream)
            ends.append(ended)
        torch.cuda.synchronize()
        return [float(started.elapsed_time(ended)) / 1000 for ended in ends]


class GraphTimer:
    """Seconds of what a device does for a computation, launched as one graph: the median of a few runs.

    Whatever is timed so should touch more memory than stays near the processors, as all layers of a model do.
    """

    def __init__(self, device: torch.device) -> None:
        self._captures = Captures(device)

    def seconds(self, run: Callable[[], object]) -> float:
        """Raises `CaptureError` where it waits for the device. Calls `run` three times."""
        captured = self._captures.capture(run)
        marks: list[torch.cuda.Event] = []
        for _ in range(_NUM_REPLAYS + 1):
            marks.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            marks[-1].record(torch.cuda.current_stream())
            captured.replay()
        marks.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        marks[-1].record(torch.cuda.current_stream())
        torch.cuda.synchronize()
        times = [float(before.elapsed_time(after)) / 1000 for before, after in pairwise(marks)]
        return statistics.median(times[1:])  # the first also waits for its launch


class _Side:
    """A stream, and the graphs that are launched on it one at a time. A graph lives as long as its load."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._captures = Captures(device)
        self._captured: WeakKeyDictionary[Load, CapturedRun[object]] = WeakKeyDictionary()

    def captured(self, load: Load) -> CapturedRun[object]:
        """The load as a graph, made when it is first asked for."""
        captured = self._captured.get(load)
        if captured is None:
            captured = self._captured[load] = self._captures.capture(load.run)
        return captured
