"""`bench offline` on a real small model on the CPU, through the command line as a user runs it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine import ConfigError, DeviceKind, DType, EngineConfig, LengthRange, Loss, WorkloadSource, gemm_peak
from engine.cli import ArchitectureName, app
from engine.gemm_peak import gemm_shapes, measure_gemm_peak, model_shapes
from engine.model_config import Architecture
from engine.offline_benchmark import OfflineBenchmark
from engine.optimum import active_parameters
from engine.random_checkpoint import sized_config, write_random_checkpoint


@pytest.fixture(autouse=True)
def quick_gemm_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same measurement, of less work: what the peak is does not matter here."""
    monkeypatch.setattr(gemm_peak, "SQUARES", {DeviceKind.CPU: (256,)})
    monkeypatch.setattr(gemm_peak, "SECONDS_PER_SHAPE", 0.01)
    monkeypatch.setattr(gemm_peak, "QUICK_SECONDS_PER_SHAPE", 0.01)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_random_checkpoint(path, sized_config(Architecture.LLAMA))
    return path


def engine_config(checkpoint: Path) -> EngineConfig:
    model = sized_config(Architecture.LLAMA)
    return EngineConfig(
        model=model,
        checkpoint=checkpoint,
        dtype=DType.FLOAT32,
        max_batch_tokens=128,
        max_sequences=16,
        max_model_len=256,
        num_blocks=256,
        num_threads=1,
    )


def test_every_token_is_generated_and_counted(checkpoint: Path) -> None:
    config = engine_config(checkpoint)
    workload = WorkloadSource(
        prompt=LengthRange(low=5, high=40), output=LengthRange(low=3, high=9), num_requests=20
    ).load()
    reported: list[int] = []
    result = OfflineBenchmark(config, workload, progress=reported.append).run()
    assert sum(reported) == workload.num_output_tokens
    # A step computes the prompt tokens and all but the last output token of each request; no end comes as a surprise.
    assert result.num_batch_tokens == workload.num_prompt_tokens + workload.num_output_tokens - 20
    assert result.num_steps >= workload.requests[0].num_output_tokens
    assert 0 < result.device_seconds <= result.seconds
    achieved = (workload.num_prompt_tokens + workload.num_output_tokens) / result.seconds
    optimum = result.gemm_peak.flops_per_second / (2 * active_parameters(config.model))
    assert result.percent_of_optimum == pytest.approx(100 * achieved / optimum)
    assert 0 < result.percent_of_optimum < 100
    waterfall = result.waterfall
    assert waterfall.optimal_tokens_per_second == pytest.approx(optimum)
    assert waterfall.wall_seconds == pytest.approx(result.seconds, rel=0.05)
    assert waterfall.percent_of_optimal == pytest.approx(
        100 * result.num_batch_tokens / result.seconds / optimum, rel=0.05
    )
    assert sum(result.num_steps_by_plan.values()) == result.num_steps


def test_requests_longer_than_the_model_are_refused_before_anything_starts(checkpoint: Path) -> None:
    workload = WorkloadSource(prompt=LengthRange(low=300, high=300), num_requests=1).load()
    with pytest.raises(ConfigError, match="--length-divisor"):
        OfflineBenchmark(engine_config(checkpoint), workload)


def test_gemm_peak_is_the_best_of_its_shapes(checkpoint: Path) -> None:
    config = engine_config(checkpoint)
    peak = measure_gemm_peak(config)
    assert set(peak.by_shape) == set(gemm_shapes(config))
    assert peak.flops_per_second == peak.by_shape[peak.shape] == max(peak.by_shape.values())
    assert (128, 2 * 128, 64) in peak.by_shape  # rows of a full batch, gate and up of the feed-forward, hidden
    of_model = [peak.by_shape[shape] for shape in model_shapes(config)]
    assert min(of_model) <= peak.dense_flops_per_second <= max(of_model)


def test_a_quick_peak_is_of_products_that_a_cpu_does_in_milliseconds(checkpoint: Path) -> None:
    large = sized_config(Architecture.LLAMA, hidden_size=8192, intermediate_size=28672, num_heads=64, num_kv_heads=8)
    config = replace(engine_config(checkpoint), model=large, max_batch_tokens=2048)
    peak = measure_gemm_peak(config, quick=True)
    assert len(peak.by_shape) == 4
    assert all(math.prod(shape) <= gemm_peak.QUICK_CPU_PRODUCTS for shape in peak.by_shape)
    assert peak.flops_per_second >= peak.dense_flops_per_second > 0


def test_the_command_writes_its_result_as_json(checkpoint: Path, tmp_path: Path) -> None:
    arguments = f"bench offline {checkpoint} --input-len 16 --output-len 4 --num-requests 8 --threads 1"
    outcome = CliRunner().invoke(app, [*arguments.split(), "--json", str(tmp_path / "result.json")])
    assert outcome.exit_code == 0, outcome.output
    assert "percent of optimum" in outcome.output and "where the time went" in outcome.output
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["num_output_tokens"] == 32
    assert result["num_prompt_tokens"] == 128
    assert result["output_tokens_per_second"] == pytest.approx(32 / result["seconds"])
    losses = result["loss_waterfall"]
    assert set(losses["loss_seconds"]) == {loss.value for loss in Loss}
    parts = losses["ideal_seconds"] - losses["skipped_head_seconds"] + sum(losses["loss_seconds"].values())
    assert parts + losses["unexplained_seconds"] == pytest.approx(losses["wall_seconds"])


def test_json_on_stdout_is_nothing_but_json(checkpoint: Path) -> None:
    arguments = f"bench offline {checkpoint} --input-len 8 --output-len 2 --num-requests 2 --threads 1 --json -"
    outcome = CliRunner().invoke(app, arguments.split())
    assert json.loads(outcome.stdout)["num_requests"] == 2


def test_make_model_writes_a_checkpoint_that_can_be_measured(tmp_path: Path) -> None:
    sizes = "--hidden-size 32 --intermediate-size 64 --num-layers 1 --num-heads 2 --num-kv-heads 1 --vocab-size 300"
    for architecture in ("llama", "qwen3-moe"):
        path = tmp_path / architecture
        made = CliRunner().invoke(app, ["make-model", str(path), "--architecture", architecture, *sizes.split()])
        assert made.exit_code == 0, made.output
        arguments = f"bench offline {path} --input-len 4 --output-len 2 --num-requests 2 --threads 1 --dtype float32"
        outcome = CliRunner().invoke(app, arguments.split())
        assert outcome.exit_code == 0, outcome.output


def test_every_architecture_has_a_name_on_the_command_line() -> None:
    assert [item.name for item in ArchitectureName] == [item.name for item in Architecture]


def test_a_bad_option_is_a_config_error() -> None:
    outcome = CliRunner().invoke(app, ["bench", "offline", ".", "--input-len", "many"])
    assert isinstance(outcome.exception, ConfigError)
    assert "--input-len" in str(outcome.exception)
