import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from engine.pipeline.capture import CaptureError, Captures, refuse_in_capture
from tests.engine.pipeline.deferred_cuda import DEVICE, RecordedGraphs, deferred_cuda, recorded_graphs


@pytest.fixture
def graphs() -> Iterator[RecordedGraphs]:
    with deferred_cuda() as cuda, recorded_graphs(cuda) as graphs:
        yield graphs


def _run(graphs: RecordedGraphs, result: object = "result") -> Callable[[], object]:
    def run() -> object:
        graphs.log.append(f"run on {graphs.cuda.current.name}, sync mode {graphs.sync_mode}")
        graphs.cuda.queue(lambda: None)
        return result

    return run


def test_two_runs_warm_up_on_the_stream_that_is_captured(graphs: RecordedGraphs) -> None:
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


def test_captures_share_a_pool_and_a_stream_and_leave_other_threads_alone(graphs: RecordedGraphs) -> None:
    captures = Captures(DEVICE)
    captures.capture(_run(graphs))
    captures.capture(_run(graphs))
    first, second = graphs.settings
    assert first == second
    assert first[0] == ("pool", 1) and graphs.num_pools == 1 and first[2] == "thread_local"


def test_a_run_that_waits_for_the_device_is_refused_before_anything_is_recorded(graphs: RecordedGraphs) -> None:
    def run() -> None:
        graphs.cuda.queue(lambda: None)
        graphs.wait_for_the_device()

    with pytest.raises(CaptureError, match="cannot become a CUDA graph, because it waits for the device"):
        Captures(DEVICE).capture(run)
    assert graphs.log == ["synchronize"]
    assert graphs.sync_mode == 0
    assert graphs.cuda.current is graphs.cuda.main


def test_other_errors_stay_what_they_are(graphs: RecordedGraphs) -> None:
    calls: list[int] = []

    def run() -> None:
        calls.append(graphs.sync_mode)
        if len(calls) == 2:
            raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ") as caught:
        Captures(DEVICE).capture(run)
    assert not isinstance(caught.value, CaptureError)
    assert calls == [0, 2] and graphs.sync_mode == 0
    assert graphs.log == ["synchronize"], "its side streams were never joined"


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted"), KeyboardInterrupt()])
def test_a_recording_that_breaks_off_leaves_the_caller_where_it_was(
    graphs: RecordedGraphs, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """As torch has it: where ending the recording fails, its stream stays the current one."""

    @contextmanager
    def breaking(graph: object, **settings: Any) -> Iterator[None]:
        graphs.cuda.current = settings["stream"]
        try:
            yield
        finally:
            raise error

    ended: list[tuple[int, object]] = []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda index, pool: ended.append((index, pool)))
    captures = Captures(DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "graph", breaking)
        with pytest.raises(type(error)):
            captures.capture(_run(graphs))
    assert graphs.log[-1] == "synchronize" and ended == [(0, ("pool", 1))]
    assert graphs.cuda.current is graphs.cuda.main
    assert captures.capture(_run(graphs)).replay() == "result"


def test_what_waits_refuses_inside_a_recording_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_in_capture("a copy")
    for is_capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=is_capturing: now)
        if is_capturing:
            with pytest.raises(CaptureError, match="a copy waits for the device"):
                refuse_in_capture("a copy")
        else:
            refuse_in_capture("a copy")


def test_what_the_graph_reads_lives_as_long_as_the_graph(graphs: RecordedGraphs) -> None:
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
