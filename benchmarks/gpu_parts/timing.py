"""`GraphTimer`: how long kernels take on the device, without launches, warm caches or a lucky moment.

Several calls, each on inputs of its own (together larger than the L2), are captured into one CUDA graph; replays are
timed with events, those of all contestants in turns; the median counts.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Run = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one call: the median of `num_replays`, and the spread between quartiles relative to it."""

    seconds: float
    spread: float
    num_replays: int


class Timer(Protocol):
    """What parts time with; tests have one that needs no device."""

    def time(self, contestants: Mapping[str, Sequence[Run]], seconds: float) -> dict[str, Timing | Exception]:
        """One call of each contestant, given as calls on different inputs; an exception in place of one that failed.

        `seconds` are for all of them together, what it takes to capture them not included.
        """
        ...


class GraphTimer:
    """On the current CUDA device."""

    def __init__(self, device: torch.device, *, min_replays: int = 5, max_replays: int = 100) -> None:
        self._device = device
        self._min = min_replays
        self._max = max_replays
        self._stream: Any = None  # one for all captures, as libraries keep memory for every stream that they have seen

    def time(self, contestants: Mapping[str, Sequence[Run]], seconds: float) -> dict[str, Timing | Exception]:
        """See `Timer`."""
        results: dict[str, Timing | Exception] = {}
        graphs: dict[str, Any] = {}
        for name, runs in contestants.items():
            try:
                graphs[name] = self._captured(runs)
            except Exception as error:  # a configuration that does not compile or launch is one row, not the end
                results[name] = error
        found: dict[str, list[float]] = {name: [] for name in graphs}
        deadline = time.monotonic() + seconds
        while graphs and len(found[next(iter(graphs))]) < self._max:
            for name, graph in graphs.items():
                found[name].append(self._replay(graph) / len(contestants[name]))
            if time.monotonic() > deadline and len(found[next(iter(graphs))]) >= self._min:
                break
        results |= {name: _timing(one) for name, one in found.items()}
        return {name: results[name] for name in contestants}

    def _captured(self, runs: Sequence[Run]) -> Any:
        self._stream = self._stream or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for run in runs:  # compiles, and lets libraries allocate
                run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph, which empties torch's cache of memory and may collect garbage for each of a thousand.
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for run in runs:
                    run()
            finally:
                graph.capture_end()
        graph.replay()
        torch.cuda.synchronize(self._device)
        return graph

    def _replay(self, graph: Any) -> float:
        begun = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begun.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        return float(begun.elapsed_time(ended)) / 1e3


def _timing(seconds: Sequence[float]) -> Timing:
    median = statistics.median(seconds)
    if len(seconds) < 2 or not median:
        return Timing(seconds=median, spread=0.0, num_replays=len(seconds))
    low, _, high = statistics.quantiles(seconds, n=4)
    return Timing(seconds=median, spread=(high - low) / median, num_replays=len(seconds))
