"""The parts that run the whole engine, on a CPU and tiny models: steady load, rows, checkpoints, other engines."""

import asyncio
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gpu_parts.throughput
import pytest
import torch
from gpu_parts.budget import NO_TIME, Budget
from gpu_parts.engine_modes import EngineMode, modes_of
from gpu_parts.graph_count import GraphCount
from gpu_parts.large_checkpoint import write_large_checkpoint
from gpu_parts.peer_contest import RIVALS, ContestSizes, Rival, run_contest
from gpu_parts.planned_schedules import LeftOut
from gpu_parts.steady_load import SteadyLoad, SteadyResult
from gpu_parts.throughput import CONTENDERS, WORKLOADS, Contender, LoadSizes, llama_8b_shape, measure_throughput
from gpu_parts.throughput_rows import EngineStart, ModeSteps, throughput_rows

from engine.checkpoint import Checkpoint
from engine.config import DeviceKind, EngineConfig, PipelineMode
from engine.gemm_peak import GemmPeak, measure_gemm_peak
from engine.inline_executor import InlineExecutor
from engine.llm_engine import LLMEngine
from engine.model_config import Architecture, DType, ModelConfig
from engine.models import build_model
from engine.pipeline.agreed_captures import AgreedCaptures
from engine.pipeline.capture import CapturedRun, Captures
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.planned_model import trace_planned_layer
from engine.random_checkpoint import sized_config
from engine.tensor_parallel import TensorParallel
from tests.benchmarks.gpu_fakes import quiet_ledger

SIZES = LoadSizes(
    device=DeviceKind.CPU,
    max_batch_tokens=32,
    max_sequences=8,
    num_blocks=64,
    window_seconds=0.5,
    warm_seconds=0.1,
    fill_seconds=10.0,
    least_seconds=1.0,
    num_threads=1,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_large_checkpoint(folder, sized_config(Architecture.LLAMA, num_layers=3))
    return folder


def test_a_large_checkpoint_has_the_weights_of_one_layer_in_all(checkpoint: Path) -> None:
    from safetensors.torch import load_file

    model = ModelConfig.from_checkpoint(checkpoint)
    assert model.num_layers == 3 and model == sized_config(Architecture.LLAMA, num_layers=3)
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.{}.mlp.down_proj.weight"
    assert tensors[name.format(0)].equal(tensors[name.format(2)]) and tensors[name.format(0)].std() > 0.01
    assert set(Checkpoint.open(checkpoint).tensors) == set(tensors)
    assert not any("one-layer" in path.name for path in checkpoint.iterdir())


async def measure(
    checkpoint: Path, num_input: int, num_output: int, num_open: int, fill_seconds: float = 10.0
) -> tuple[SteadyResult | None, LLMEngine]:
    config = EngineConfig(
        model=ModelConfig.from_checkpoint(checkpoint),
        checkpoint=checkpoint,
        dtype=DType.FLOAT32,
        max_model_len=256,
        max_batch_tokens=32,
        max_sequences=8,
        num_blocks=64,
        num_threads=1,
        pipeline=PipelineMode.SEQUENTIAL,
        prefix_caching=False,
    )
    engine = LLMEngine(config, InlineExecutor(config))
    await engine.start()
    try:
        load = SteadyLoad(engine, config, num_input, num_output, num_open)
        return await load.measure(0.5, fill_seconds, 0.1), engine
    finally:
        await engine.close()


@pytest.mark.parametrize("num_open", [8, 12])
def test_a_window_of_a_steady_load(checkpoint: Path, num_open: int) -> None:
    """With more requests than rows, the rest wait and the load counts as steady once some have been followed."""
    result, engine = asyncio.run(measure(checkpoint, 20, 12, num_open))
    assert result is not None
    assert result.mean_running > 7 and result.num_steps > 5
    # Of every request all tokens but the last are computed: 20 + 11, of which 12 come out.
    assert result.num_tokens / result.num_output_tokens == pytest.approx(31 / 12, rel=0.4)
    assert result.tokens_per_second == pytest.approx(result.num_tokens / result.seconds)
    assert result.waterfall is not None
    assert result.waterfall.wall_seconds == pytest.approx(result.seconds, rel=0.2)
    stats = engine.stats()
    assert stats.num_running == stats.num_waiting == 0, "nothing of it is left"


def test_a_load_that_never_fills_is_given_up(checkpoint: Path) -> None:
    result, engine = asyncio.run(measure(checkpoint, 60, 190, 8, fill_seconds=0.0))
    assert result is None and engine.stats().num_running == 0


CUT_IN_HALVES = """\
nano-batches: 4+12 4+12
compute: {steps}
"""


def schedule_text() -> str:
    """Every operation of a Llama's layer on one half, then on the other."""
    nodes = trace_planned_layer(sized_config(Architecture.LLAMA)).graph.nodes
    steps = [f"{node.name}[{start}:{start + 16}]" for start in (0, 16) for node in nodes]
    return CUT_IN_HALVES.format(steps=" ".join(steps))


@pytest.mark.slow
def test_throughput_has_a_row_for_every_workload_and_mode(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_parts.throughput, "measure_gemm_peak", partial(measure_gemm_peak, quick=True))
    ledger = quiet_ledger(tmp_path, "throughput")
    workloads = ((40, 8), (8, 16))
    contenders = [
        Contender(dtype="float32", workloads=workloads, has_modes=True),
        Contender(dtype="int3", workloads=workloads[:1]),
    ]
    schedules = tmp_path / "schedules"
    schedules.mkdir()
    (schedules / "planned.schedule").write_text(schedule_text())
    (schedules / "wrong.schedule").write_text("nano-batches: 4+12 4+12\ncompute: no_such[0:32]\n")
    (schedules / "unread.txt").write_text("not a schedule")
    measure_throughput(ledger, Budget(100.0), checkpoint, SIZES, contenders, schedules)
    rows = {row.name: row for row in ledger.rows if row.group == "throughput"}
    assert len(rows) == 7, [(row.name, row.note) for row in ledger.rows]
    sequential, overlap, nanobatch, unread, wrong, other, unknown = rows
    assert (sequential, other) == ("40/8 float32 sequential", "8/16 float32 sequential")
    assert overlap.startswith("40/8 float32 overlap planned")
    assert nanobatch.startswith("40/8 float32 nanobatch planned")
    row = rows[sequential]
    assert row.value is not None and row.value > 0 and row.percent is not None and 0 < row.percent < 100
    assert row.details["loss_waterfall"]["wall_seconds"] > 0 and "running" in row.note
    assert row.details["step_parts"]["device_seconds"] > 0 and "64 blocks of 64" in row.note
    assert row.is_right is None, "on a CPU nothing is replayed, and nothing need be"
    assert set(row.details["num_steps_by_plan"]) == {"sequential"}
    for name in (overlap, nanobatch):
        assert rows[name].value and set(rows[name].details["num_steps_by_plan"]) - {"sequential"}, rows[name].note
    assert {wrong, unread} == {"40/8 float32 wrong", "40/8 float32 unread.txt"}
    assert "no_such" in rows["40/8 float32 wrong"].note and "line 1" in rows["40/8 float32 unread.txt"].note
    assert rows[unknown].is_right is False and "int3" in rows[unknown].note
    gaps = [row for row in ledger.rows if row.group == "CPU gap"]
    assert len(gaps) == 4 and all(row.value is not None and row.value >= 0 for row in gaps)
    assert any(row.group == "waterfall" and "optimum" in row.name for row in ledger.rows)
    (start,) = (row for row in ledger.rows if row.group == "start")
    assert start.name == "float32" and "0 graphs, 64 blocks of 64" in start.note


def test_without_a_folder_halves_take_turns(checkpoint: Path) -> None:
    model = ModelConfig.from_checkpoint(checkpoint)
    config = EngineConfig(model=model, checkpoint=checkpoint, dtype=DType.FLOAT32, max_batch_tokens=32, max_sequences=8)
    pipeline = Pipeline(build_model(model, TensorParallel(), torch.float32, torch.device("cpu")), model.hidden_size)
    modes = list(modes_of(pipeline, config, (16, 8), None))
    assert not [mode for mode in modes if isinstance(mode, LeftOut)]
    names = [mode.name for mode in modes]
    assert len(set(names)) == len(names) >= 4 and names[0] == "sequential"
    assert {mode.mode for mode in modes if isinstance(mode, EngineMode)} == set(PipelineMode)


def start_of(**changed: Any) -> EngineStart:
    values: dict[str, Any] = {
        "is_cuda": True, "num_graphs": 23, "num_blocks": 14_000, "block_size": 64, "num_operations": 12,
        "num_by_kernels": 7, "told": (),
    }  # fmt: skip
    return EngineStart(**values | changed)


@pytest.mark.parametrize(
    ("changed", "of_steps", "wanted"),
    [
        ({}, {}, ""),
        ({"num_graphs": 0, "told": ("no step becomes a CUDA graph. It waits.",)}, {"num_replayed": 0}, "NO CUDA GRAPH"),
        ({"num_by_kernels": 0, "told": ("layers are computed by plain torch",)}, {}, "NO KERNELS USED"),
        ({}, {"num_replayed": 40}, "ONLY 40 OF 100 STEPS REPLAYED FROM GRAPHS"),
        ({}, {"is_planned": True}, "NO GRAPH OF ITS PLAN"),
        ({}, {"is_planned": True, "num_captured": 3}, ""),
    ],
)
def test_an_engine_that_is_not_what_it_was_meant_to_be_is_wrong(
    changed: dict[str, Any], of_steps: dict[str, Any], wanted: str, checkpoint: Path
) -> None:
    config = EngineConfig(
        model=ModelConfig.from_checkpoint(checkpoint), checkpoint=checkpoint, dtype=DType.FLOAT32
    )  # fmt: skip
    result = SteadyResult(
        seconds=8.0, num_tokens=200_000, num_output_tokens=60_000, num_steps=100, mean_running=677.0, fill_seconds=30.0,
        num_steps_by_plan={"sequential": 100}, waterfall=None,
        step_parts={"num_timed_steps": 100, "device_seconds": 7.9, "gemm_seconds": 4.0, "attention_seconds": 3.0},
    )  # fmt: skip
    usual: dict[str, Any] = {
        "is_planned": False, "num_captured": 0, "num_replayed": 100, "num_steps": 100, "clocks": "650 W, 1755 MHz",
    }  # fmt: skip
    steps = ModeSteps(**usual | of_steps)
    start = start_of(**changed)
    peak = GemmPeak(flops_per_second=7e14, dense_flops_per_second=7e14, shape=(1, 1, 1), by_shape={}, num_threads=1)
    (row,) = throughput_rows("name", result, peak, config, start, steps)
    assert row.is_right is (not wanted) and wanted in row.note and "650 W" in row.note
    assert "device 98.8 % busy, 50.0 % products, 37.5 % attention" in row.note
    assert all(text in row.note for text in start.told), "what the engine said is in the row"
    assert start.row("bfloat16", 12.0).is_right is not ("num_" in "".join(changed))


def test_graphs_are_counted_whoever_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    count = GraphCount()
    graph: Any = type("Graph", (), {"replay": lambda self: None})()
    monkeypatch.setattr(Captures, "rehearse", lambda self, run: run())
    monkeypatch.setattr(Captures, "record", lambda self, run: CapturedRun(graph, run(), run))
    captures = Captures.__new__(Captures)
    monkeypatch.setattr(Captures, "__init__", lambda self, device: None)
    agreed = AgreedCaptures(torch.device("cpu"), TensorParallel())
    with count.counting():
        captured = captures.capture(lambda: 7)
        assert captured.replay() == captured.replay() == 7
        assert agreed.capture(lambda: 6).replay() == 6, "an engine's steps are captured by these"
    captures.capture(lambda: 8).replay()
    assert (count.num_captured, count.num_replayed) == (2, 3)


def test_the_first_workload_comes_first_and_all_are_there(tmp_path: Path) -> None:
    assert CONTENDERS[0] == Contender(dtype="bfloat16", workloads=((1024, 512),), has_modes=True)
    for dtype in ("bfloat16", "fp8"):
        found = [workload for contender in CONTENDERS for workload in contender.workloads if contender.dtype == dtype]
        assert sorted(found) == sorted(WORKLOADS)
    ledger = quiet_ledger(tmp_path, "throughput")
    measure_throughput(ledger, Budget(0.0), tmp_path)
    assert [row.note for row in ledger.rows] == [NO_TIME] * 8
    assert llama_8b_shape().num_layers == 32


def test_engines_that_are_not_there_are_said_to_be_absent(tmp_path: Path) -> None:
    ledger = quiet_ledger(tmp_path, "peers")
    absent = Rival(name="absent", module="peer_engines.absent", package="no_such_package")
    run_contest(ledger, Budget(100.0), tmp_path, rivals=(absent,))
    run_contest(ledger, Budget(0.0), tmp_path, rivals=RIVALS[:1])
    assert [row.note for row in ledger.rows] == ["no_such_package is not installed", NO_TIME]


@pytest.mark.slow
def test_engines_run_the_same_requests(tmp_path: Path, checkpoint: Path) -> None:
    ledger = quiet_ledger(tmp_path, "peers")
    sizes = ContestSizes(num_requests=4, num_input=12, num_output=6, device="cpu", dtype="float32", vocabulary=500)
    broken = replace(RIVALS[0], name="broken", module="peer_engines.no_such_engine")
    run_contest(ledger, Budget(120.0), checkpoint, sizes, (RIVALS[0], broken, RIVALS[1]))
    rows = {row.name: row for row in ledger.rows}
    assert rows["nanoserve"].value is not None and rows["nanoserve"].value > 0
    assert rows["broken"].value is None and "no_such_engine" in rows["broken"].note
    peer = rows["transformers continuous batching"]
    assert peer.value is not None, peer.note
