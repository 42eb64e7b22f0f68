"""`CapturedRun`: a computation of fixed shapes as a CUDA graph: recorded once, then launched as a whole.

What it reads and writes from outside, inputs and buffers, belongs to the caller, who keeps it where it is and changes
it in place. All graphs of one `Captures` share a memory pool, as at most one of them runs at a time.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")


class CaptureError(RuntimeError):
    """The computation waits for the device somewhere, which a graph cannot."""


class CaptureMemoryError(CaptureError):
    """There is no memory left for this graph; a smaller one may still fit."""


def refuse_in_capture(what: str) -> None:
    """Raise `CaptureError` where the current stream is being captured; `what` waits for the device."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise CaptureError(f"This cannot become a CUDA graph: {what} waits for the device.")


class Captures:
    """Makes captured runs on one device, all on one stream and in one memory pool; one thread at a time.

    Other threads may go on using the device meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], Result]) -> "CapturedRun[Result]":
        """Call `run` three times, twice for real and the last time to record what it launches.

        Streams that it uses must branch off the current one and join it again. Raises `CaptureError` where it waits
        for the device: that is found out before anything is recorded, because a recording that breaks off leaves
        torch's allocator in a state of its own. Whatever is raised, the device has ended its work by then, and the
        caller's stream is current and can be used.
        """
        self.rehearse(run)
        return self.record(run)

    def rehearse(self, run: Callable[[], object]) -> None:
        """Call `run` twice for real, the second time so that waiting for the device raises `CaptureError`."""
        caller = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(caller)
        with self._breaking_off_in_order(caller), torch.cuda.stream(self._stream):
            run()  # libraries initialise themselves, buffers are made
            with _without_waiting():
                run()
        caller.wait_stream(self._stream)

    def record(self, run: Callable[[], Result]) -> "CapturedRun[Result]":
        """The graph of what `run` launches, once it has been rehearsed."""
        graph = torch.cuda.CUDAGraph()
        # Thread-local, as NCCL's watchdog thread looks at events meanwhile.
        recording = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with self._breaking_off_in_order(torch.cuda.current_stream(self._stream.device)), recording:
            result = run()
        return CapturedRun(graph, result, run)

    @contextmanager
    def _breaking_off_in_order(self, caller: torch.cuda.Stream) -> Iterator[None]:
        """After an exception nothing runs or is recorded any more, and `caller` is current.

        Where the end of a recording fails, torch neither leaves the stream nor tells its allocator. Work begun on a
        side stream may still read what the exception frees, so the device is waited for.
        """
        try:
            with torch.cuda.stream(caller):
                yield
        except BaseException:
            _end_recording(self._stream.device, self._pool)
            torch.cuda.synchronize(self._stream.device)
            raise


class CapturedRun(Generic[Result]):
    """What `Captures.capture` returns."""

    def __init__(self, graph: torch.cuda.CUDAGraph, result: Result, run: Callable[[], Result]) -> None:
        self._graph = graph
        self._result = result
        self._run = run  # keeps alive what the graph reads

    def replay(self) -> Result:
        """Queue the whole computation on the current stream. Results that `run` made itself, rather than wrote into
        the caller's buffers, last until any run of the same `Captures` is replayed.
        """
        self._graph.replay()
        return self._result


@contextmanager
def _without_waiting() -> Iterator[None]:
    """Where torch would wait for the device it raises instead (collectives are not looked at)."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that not all waiting is found
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        raise CaptureError(f"This cannot become a CUDA graph, because it waits for the device: {error}") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _end_recording(device: torch.device, pool: object) -> None:
    """Have the allocator end what a failed end of a recording has left open; nothing where it has ended."""
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)  # a torch without CUDA has none
    if end is not None:
        with suppress(RuntimeError):  # it was not open
            end(torch.device(device).index or 0, pool)
