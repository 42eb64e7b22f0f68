"""Two ranks: their sums by every way there is, and their tokens, are those of one; on CPUs, and on two GPUs.

What a rank does is one function for both kinds of device. On GPUs (`make test-gpu` on a machine with two of them)
messages go through NCCL, NCCL on few execution units, and symmetric memory, launched and captured; on CPUs all of them
go through gloo, launched.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.batch import Batch, StepOutput
from engine.config import DeviceKind, EngineConfig, PipelineMode
from engine.local_group import LocalGroup
from engine.model_config import Architecture
from engine.pipeline.agreed_captures import AgreedCaptures
from engine.random_checkpoint import write_random_checkpoint
from engine.tensor_parallel import TensorParallel
from engine.worker import Worker
from tests.engine.gpu_case import GREEDY, NUM_BLOCKS, NUM_TOKENS, answers, config_of

NETWORK_CTAS, SYMMETRIC_BYTES = 4, 2**19
# Rows of 256 bytes: few, the most that symmetric memory sums in one shot, the most it sums at all, and more than that.
WIDTH = 64
SIZES = (1, 1024, 2048, 3000)
DEVICES = [
    DeviceKind.CPU,
    pytest.param(
        DeviceKind.CUDA,
        marks=[
            pytest.mark.multi_gpu,
            pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
        ],
    ),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(folder, config_of(Architecture.LLAMA).model, seed=3)
    return folder


@pytest.fixture(params=DEVICES)
def config(request: pytest.FixtureRequest, checkpoint: Path) -> EngineConfig:
    """Of one rank. The dense batch is what lets symmetric memory have messages of `SYMMETRIC_BYTES`."""
    return replace(
        config_of(Architecture.LLAMA, max_batch_tokens=SIZES[2]),
        checkpoint=checkpoint,
        device=request.param,
        num_blocks=NUM_BLOCKS,
        num_threads=1,
        plan_seconds=0,
        network_ctas=NETWORK_CTAS,
        symmetric_bytes=SYMMETRIC_BYTES,
    )


@pytest.fixture
def group(config: EngineConfig) -> Iterator[LocalGroup]:
    with LocalGroup(replace(config, tensor_parallel=2)) as group:
        yield group


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """What a rank's messages can go through, beside the group's own communicator."""

    has_narrow: bool
    symmetric_bytes: int


def ways_of(worker: Worker) -> Ways:
    network = worker.tensor_parallel
    sums: Any = network.small_sums
    return Ways(has_narrow=network.narrow_group is not None, symmetric_bytes=0 if sums is None else sums.limit)


def shown(worker: Worker, way: str, num_rows: int, *, is_captured: bool = False) -> list[list[float]]:
    """The sums of two messages that differ from rank to rank and row to row, launched or replayed."""
    network, device = _only(worker.tensor_parallel, way), worker.runner.device
    message = torch.empty(num_rows, WIDTH, device=device)

    def run() -> None:
        work = network.start_all_reduce(message, is_beside=way == "narrow")
        if work is not None:
            work.wait()

    launch: Callable[[], object] = run
    if is_captured:
        message.zero_()
        launch = AgreedCaptures(device, worker.tensor_parallel).capture(run).replay
    found = []
    for number in range(2):
        message.copy_(_message(number, network.rank, num_rows))
        launch()
        found.append(message[:, 0].tolist())
        assert bool((message == message[:, :1]).all())
    return found


def _only(network: TensorParallel, way: str) -> TensorParallel:
    """Without the ways that would take a message from this one."""
    return network if way == "symmetric" else replace(network, small_sums=None)


def _message(number: int, rank: int, num_rows: int) -> torch.Tensor:
    """Whole numbers, whose sums are exact in every order."""
    rows = torch.arange(num_rows, dtype=torch.float32)
    return (rows * (rank + 1) + 1000 * number + 7 * rank)[:, None].expand(-1, WIDTH)


@pytest.mark.slow
def test_sums_of_two_ranks_are_right_by_every_way(group: LocalGroup, config: EngineConfig) -> None:
    on_gpus = config.device is DeviceKind.CUDA
    ways = group.run(ways_of)
    assert ways == [ways[0]] * 2 and ways[0].has_narrow is on_gpus
    if on_gpus and not ways[0].symmetric_bytes:
        pytest.skip("these GPUs see no memory of each other (the log says why), so NCCL alone could be tested")
    for way in ("plain", "narrow", "symmetric"):
        for num_rows in SIZES:
            sums = [_message(number, 0, num_rows) + _message(number, 1, num_rows) for number in (0, 1)]
            expected = [each[:, 0].tolist() for each in sums]
            for is_captured in (False, True) if on_gpus else (False,):
                assert group.run(shown, way, num_rows, is_captured=is_captured) == [expected] * 2, (way, num_rows)


def units_of(worker: Worker, folder: Path) -> list[int]:
    """The blocks of every kernel that a collective beside other work launches."""
    network = _only(worker.tensor_parallel, "narrow")
    message = torch.zeros(1 << 22, device=worker.runner.device)
    path = folder / f"{network.rank}.json"
    for is_recorded in (False, True):  # the first connects the ranks
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
            work = network.start_all_reduce(message, is_beside=True)
            assert work is not None
            work.wait()
            torch.cuda.synchronize()
        if is_recorded:
            recorded.export_chrome_trace(str(path))
    return kernel_blocks(path, "nccl")


def kernel_blocks(trace: Path, name: str) -> list[int]:
    """Of the kernels so named in a trace of torch's profiler."""
    events = json.loads(trace.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel" and name in event["name"].lower()]
    return [math.prod(event["args"]["grid"]) for event in kernels]


def test_blocks_are_read_from_a_trace(tmp_path: Path) -> None:
    nccl = {"cat": "kernel", "name": "ncclDevKernel_AllReduce_Sum_f32_RING_LL(x)", "args": {"grid": [4, 1, 1]}}
    others = [{"cat": "kernel", "name": "gemm", "args": {"grid": [132, 2, 1]}}, {"name": "nccl:all_reduce"}]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": [nccl, *others]}))
    assert kernel_blocks(tmp_path / "trace.json", "nccl") == [4]


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("config", [DeviceKind.CUDA], indirect=True)
def test_a_collective_beside_other_work_takes_few_units(group: LocalGroup, tmp_path: Path) -> None:
    for blocks in group.run(units_of, tmp_path):
        assert blocks and max(blocks) <= NETWORK_CTAS


def step(worker: Worker, batch: Batch) -> StepOutput:
    return worker.execute(batch).wait()


def graphs(worker: Worker) -> list[Any]:
    """The sizes that this rank has a graph for."""
    padded = worker.runner.padded
    return [] if padded is None else [*padded._sizes, padded.num_planned]


@pytest.mark.slow
@pytest.mark.parametrize("mode", [PipelineMode.SEQUENTIAL, PipelineMode.OVERLAP])
def test_an_engine_of_two_ranks_draws_the_tokens_of_one(mode: PipelineMode, config: EngineConfig) -> None:
    one = replace(config, pipeline=mode, max_batch_tokens=40)
    samplings = [GREEDY] * 4
    found = []
    for size in (1, 2):
        with LocalGroup(replace(one, tensor_parallel=size)) as group:
            found.append(answers(one, lambda batch, group=group: group.run(step, batch)[0], samplings))  # type: ignore[misc]
            made = group.run(graphs)
            assert made == [made[0]] * size
    assert found[0] == found[1]
    assert [len(row) for row in found[0]] == [NUM_TOKENS] * 4 and len({tuple(row) for row in found[0]}) > 1
