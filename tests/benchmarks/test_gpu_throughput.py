"""The parts that run the whole engine, on a CPU and tiny models: steady load, rows, checkpoints, other engines."""

import asyncio
from dataclasses import replace
from functools import partial
from pathlib import Path

import gpu_parts.correctness
import gpu_parts.throughput
import pytest
import torch
from gpu_parts.budget import NO_TIME, Budget
from gpu_parts.correctness import check_engine
from gpu_parts.large_checkpoint import write_large_checkpoint
from gpu_parts.peer_contest import RIVALS, ContestSizes, Rival, run_contest
from gpu_parts.steady_load import SteadyLoad, SteadyResult
from gpu_parts.throughput import CONTENDERS, WORKLOADS, Contender, LoadSizes, llama_8b_shape, measure_throughput

from engine.checkpoint import Checkpoint
from engine.config import DeviceKind, EngineConfig, PipelineMode
from engine.gemm_peak import measure_gemm_peak
from engine.inline_executor import InlineExecutor
from engine.llm_engine import LLMEngine
from engine.model_config import Architecture, DType, ModelConfig
from engine.random_checkpoint import sized_config
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
    assert result.num_tokens / result.num_output_tokens == pytest.approx(31 / 12, rel=0.25)
    assert result.tokens_per_second == pytest.approx(result.num_tokens / 0.5, rel=0.2)
    assert result.waterfall is not None
    assert result.waterfall.wall_seconds == pytest.approx(result.seconds, rel=0.2)
    stats = engine.stats()
    assert stats.num_running == stats.num_waiting == 0, "nothing of it is left"


def test_a_load_that_never_fills_is_given_up(checkpoint: Path) -> None:
    result, engine = asyncio.run(measure(checkpoint, 60, 190, 8, fill_seconds=0.0))
    assert result is None and engine.stats().num_running == 0


@pytest.mark.slow
def test_throughput_has_a_row_for_every_contender(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_parts.throughput, "measure_gemm_peak", partial(measure_gemm_peak, quick=True))
    ledger = quiet_ledger(tmp_path)
    workloads = ((16, 8), (8, 16))
    contenders = [
        Contender(dtype="float32", mode=mode, workloads=workloads[: 1 + (mode is PipelineMode.SEQUENTIAL)])
        for mode in PipelineMode
    ] + [Contender(dtype="int3", mode=PipelineMode.SEQUENTIAL, workloads=workloads[:1])]
    measure_throughput(ledger, Budget(100.0), checkpoint, SIZES, contenders)
    rows = {row.name: row for row in ledger.rows if row.group == "throughput"}
    assert list(rows) == [
        "16/8 float32 sequential", "8/16 float32 sequential", "16/8 float32 nanobatch", "16/8 float32 overlap",
        "16/8 int3 sequential",
    ]  # fmt: skip
    row = rows["16/8 float32 sequential"]
    assert row.value is not None and row.value > 0 and row.percent is not None and 0 < row.percent < 100
    assert row.details["loss_waterfall"]["wall_seconds"] > 0 and "running" in row.note
    unknown = rows["16/8 int3 sequential"]
    assert unknown.value is None and "int3" in unknown.note
    gaps = [row for row in ledger.rows if row.group == "CPU gap"]
    assert len(gaps) == 4 and all(row.value is not None and row.value >= 0 for row in gaps)
    assert any(row.group == "waterfall" and "optimum" in row.name for row in ledger.rows)


def test_the_first_workload_comes_first_and_all_are_there(tmp_path: Path) -> None:
    assert CONTENDERS[0] == Contender(
        dtype="bfloat16", mode=PipelineMode.SEQUENTIAL, workloads=((1024, 512),)
    )  # fmt: skip
    for dtype in ("bfloat16", "fp8"):
        found = [
            workload
            for contender in CONTENDERS
            for workload in contender.workloads
            if contender.dtype == dtype and contender.mode is PipelineMode.SEQUENTIAL
        ]
        assert sorted(found) == sorted(WORKLOADS)
    assert {contender.mode for contender in CONTENDERS} == set(PipelineMode)
    ledger = quiet_ledger(tmp_path)
    measure_throughput(ledger, Budget(0.0), tmp_path)
    assert [row.note for row in ledger.rows] == [NO_TIME] * 11
    assert llama_8b_shape().num_layers == 32


@pytest.mark.slow
def test_the_engine_is_compared_with_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts.correctness, "PROMPT_LENGTHS", (1, 7, 33))
    monkeypatch.setattr(gpu_parts.correctness, "NUM_OUTPUT_TOKENS", 4)
    ledger = quiet_ledger(tmp_path)
    check_engine(ledger, Budget(100.0), tmp_path, DeviceKind.CPU, (Architecture.LLAMA,))
    (row,) = ledger.rows
    assert row.is_right and row.note.startswith("6 of 6")
    check_engine(ledger, Budget(0.0), tmp_path, DeviceKind.CPU, (Architecture.LLAMA,))
    assert ledger.rows[-1].note == NO_TIME
    if not torch.cuda.is_available():
        check_engine(ledger, Budget(100.0), tmp_path, DeviceKind.CUDA, (Architecture.QWEN3,))
        assert ledger.rows[-1].is_right is False and ledger.rows[-1].note


def test_engines_that_are_not_there_are_said_to_be_absent(tmp_path: Path) -> None:
    ledger = quiet_ledger(tmp_path)
    absent = Rival(name="absent", module="peer_engines.absent", package="no_such_package")
    run_contest(ledger, Budget(100.0), tmp_path, rivals=(absent,))
    run_contest(ledger, Budget(0.0), tmp_path, rivals=RIVALS[:1])
    assert [row.note for row in ledger.rows] == ["no_such_package is not installed", NO_TIME]


@pytest.mark.slow
def test_engines_run_the_same_requests(tmp_path: Path, checkpoint: Path) -> None:
    ledger = quiet_ledger(tmp_path)
    sizes = ContestSizes(num_requests=4, num_input=12, num_output=6, device="cpu", dtype="float32", vocabulary=500)
    broken = replace(RIVALS[0], name="broken", module="peer_engines.no_such_engine")
    run_contest(ledger, Budget(120.0), checkpoint, sizes, (RIVALS[0], broken, RIVALS[1]))
    rows = {row.name: row for row in ledger.rows}
    assert rows["nanoserve"].value is not None and rows["nanoserve"].value > 0
    assert rows["broken"].value is None and "no_such_engine" in rows["broken"].note
    peer = rows["transformers continuous batching"]
    assert peer.value is not None, peer.note
