"""Graphs are there on every rank of a group or on none, and no rank is left waiting inside a collective."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.model_config import Architecture
from engine.pipeline.agreed_captures import AgreedCaptures
from engine.pipeline.capture import CaptureError, CaptureMemoryError
from engine.tensor_parallel import TensorParallel
from tests.engine.gpu_case import config_of, runner_of
from tests.engine.pipeline.deferred_cuda import DEVICE, RecordedGraphs, deferred_cuda, recorded_graphs
from tests.engine.rank_processes import run_ranks

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")


def _captures(tensor_parallel: TensorParallel) -> AgreedCaptures:
    """Numbers that ranks agree on are on the CPU: there is no other device."""
    captures = AgreedCaptures(DEVICE, tensor_parallel)
    captures._agreement._device = torch.device("cpu")
    return captures


@pytest.mark.parametrize("others", [0, 1, 2, 3])
@pytest.mark.parametrize("own", [None, CaptureError("It waits."), OUT_OF_MEMORY])
def test_ranks_go_by_the_worst(own: Exception | None, others: int) -> None:
    """`others`: how it ended elsewhere, as ranks tell each other: 3 for well."""

    def run() -> str:
        if own is not None:
            raise own
        return "result"

    with deferred_cuda() as cuda, recorded_graphs(cuda):
        captures = _captures(TensorParallel())
        captures._agreement = SimpleNamespace(smallest=lambda given: [min(*given, others)])  # type: ignore[assignment]
        if own is None and others == 3:
            assert captures.capture(run).replay() == "result"
            return
        with pytest.raises(CaptureError) as raised:
            captures.capture(run)
    is_memory = others >= 2 and own in (None, OUT_OF_MEMORY)
    assert isinstance(raised.value, CaptureMemoryError) is is_memory
    words: dict[type, str] = {
        CaptureError: "It waits.",
        torch.OutOfMemoryError: "No memory for a CUDA graph: CUDA out of memory.",
    }
    is_own = own is not None and others >= (1 if isinstance(own, CaptureError) else 2)
    assert str(raised.value).startswith(words[type(own)] if is_own else "Another rank of the group")


class _ForgottenError(Exception):
    pass


def test_an_end_of_a_recording_that_fails_in_turn_lacked_memory() -> None:
    with deferred_cuda() as cuda, recorded_graphs(cuda):
        captures = _captures(TensorParallel())

        def run() -> None:
            try:
                raise OUT_OF_MEMORY
            finally:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

        with pytest.raises(CaptureMemoryError, match="No memory for a CUDA graph: CUDA out of memory"):
            captures.capture(run)


def test_what_is_no_matter_of_graphs_is_told_and_stays_what_it_is() -> None:
    told: list[int] = []
    with deferred_cuda() as cuda, recorded_graphs(cuda):
        captures = _captures(TensorParallel())
        captures._agreement = SimpleNamespace(smallest=lambda given: told.extend(given))  # type: ignore[assignment]

        def run() -> None:
            raise _ForgottenError

        with pytest.raises(_ForgottenError):
            captures.capture(run)
    assert told == [0]


def test_buckets_without_memory_are_none_any_more(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")

    class Scarce:
        """There is memory for some sizes."""

        def capture(self, run: Callable[[], torch.Tensor]) -> Any:
            if len(run()) in lacking:
                raise CaptureMemoryError("No memory for a CUDA graph.")
            return SimpleNamespace(replay=run)

    lacking = {22, 8}
    runner = runner_of(config_of(Architecture.LLAMA, max_batch_tokens=22), kernels=True)
    with caplog.at_level(logging.WARNING):
        runner.pad_steps(Scarce())  # type: ignore[arg-type]
    assert runner.padded is not None
    assert runner.padded._sizes == (1, 2, 4, 16)
    assert [record.message for record in caplog.records] == [
        f"Steps of {size} tokens are no CUDA graph: No memory for a CUDA graph." for size in (22, 8)
    ]
    lacking = {1, 2, 4, 8, 16, 22}
    with pytest.raises(CaptureMemoryError):
        runner.pad_steps(Scarce())  # type: ignore[arg-type]


def _capture_on_rank(rank: int, size: int, folder: Path) -> None:
    """A rank of a group whose second rank fails in the middle of what it captures; writes what it is left with."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),  # a rank left waiting fails
    )
    tensor_parallel = TensorParallel(rank, size, dist.group.WORLD)
    outcome = []
    with deferred_cuda() as cuda, recorded_graphs(cuda) as graphs:
        captures = _captures(tensor_parallel)
        for failure in (None, "in memory", "waiting", "recording"):
            outcome.append(_outcome(captures, tensor_parallel, graphs, failure if rank == 1 else None))
    sums = tensor_parallel.all_reduce(torch.tensor([1.0 + rank]))
    (folder / str(rank)).write_text("\n".join([*outcome, f"{sums.item():g}"]))
    dist.destroy_process_group()


def _outcome(
    captures: AgreedCaptures, tensor_parallel: TensorParallel, graphs: RecordedGraphs, failure: str | None
) -> str:
    sizes = []

    def run() -> str:
        is_recording = bool(graphs.log) and graphs.log[-1] == "begin"
        with tensor_parallel.silent() if is_recording else nullcontext():  # a graph only notes what gloo would do
            return exchange(is_recording)

    def exchange(is_recording: bool) -> str:
        """Two collectives of different sizes with what fails between them."""
        tensor_parallel.all_reduce(torch.ones(3))
        if failure == "in memory" or (failure == "recording" and is_recording):
            raise OUT_OF_MEMORY
        if failure == "waiting":
            graphs.wait_for_the_device()
        gathered = tensor_parallel.all_gather(torch.ones(1, 2))
        sizes.append(tensor_parallel.all_reduce(torch.ones(1)).item())
        return f"{tuple(gathered.shape)}"

    try:
        return f"{captures.capture(run).replay()} {sizes}"
    except CaptureError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.slow
def test_no_rank_waits_for_one_that_has_failed(tmp_path: Path) -> None:
    run_ranks(_capture_on_rank, 2, tmp_path)
    first, second = ((tmp_path / str(rank)).read_text().splitlines() for rank in range(2))
    # Alone, alone, together, and recorded.
    assert first[0] == second[0] == "(1, 4) [1.0, 1.0, 2.0, 1.0]"
    memory = "CaptureMemoryError: No memory for a CUDA graph: CUDA out of memory."
    elsewhere = "CaptureMemoryError: Another rank of the group has no memory for this CUDA graph."
    refused = "CaptureError: Another rank of the group cannot make this a CUDA graph; its own log says more."
    assert first[1:3] == [elsewhere, refused] and second[1] == memory
    assert second[2].startswith("CaptureError: This cannot become a CUDA graph")
    assert (first[3], second[3]) == (elsewhere, memory)
    assert first[4] == second[4] == "3"
