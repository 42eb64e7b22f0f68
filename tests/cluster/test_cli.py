"""The options of `nanoserve serve` and `generate` that say how steps run: what arrives, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster import cli
from cluster import generate as generate_module
from cluster.config import ServingConfig
from engine import DeviceKind, EngineConfig, NumberFormat, PipelineMode
from engine.model_config import Architecture
from engine.random_checkpoint import sized_config, write_random_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("models") / "tiny"
    write_random_checkpoint(path, sized_config(Architecture.LLAMA))
    return path


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServingConfig]:
    """What `serve` would have served."""
    configs: list[ServingConfig] = []

    def serve(config: ServingConfig, *_: Any) -> int:
        configs.append(config)
        return 0

    monkeypatch.setattr(cli, "_serve", serve)
    return configs


@pytest.mark.parametrize("mode", PipelineMode)
def test_serve_takes_the_mode_and_the_time_to_plan(
    checkpoint: Path, tmp_path: Path, served: list[ServingConfig], mode: PipelineMode
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {checkpoint}\npipeline: nanobatch\nplan_seconds: 3\n")
    arguments = ["serve", str(recipe), "--pipeline", mode, "--plan-seconds", "1.5"]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    assert CliRunner().invoke(cli.app, arguments[:2]).exit_code == 0
    flags, recipe_alone = served
    assert (flags.pipeline, flags.plan_seconds) == (mode, 1.5)
    assert (recipe_alone.pipeline, recipe_alone.plan_seconds) == (PipelineMode.NANOBATCH, 3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--pipeline fast", "pipeline: input should be 'sequential', 'nanobatch' or 'overlap', but it is 'fast'."),
        ("--plan-seconds -1", "plan_seconds: input should be greater than or equal to 0, but it is -1.0."),
        ("--plan-seconds inf", "plan_seconds: input should be a finite number, but it is inf."),
    ],
)
def test_serve_names_a_bad_value(checkpoint: Path, served: list[ServingConfig], options: str, expected: str) -> None:
    outcome = CliRunner().invoke(cli.app, ["serve", str(checkpoint), *options.split()])
    assert outcome.exit_code == cli.EXIT_CONFIG
    assert f"{checkpoint}: {expected}" in outcome.stderr.replace("\n", "")
    assert not served


def test_generate_takes_the_mode_and_never_plans(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[EngineConfig] = []

    async def print_text(config: EngineConfig, *_: Any) -> None:
        configs.append(config)

    monkeypatch.setattr(generate_module, "_print_text", print_text)
    arguments = ["generate", str(checkpoint), "Hello", "--raw", "--device", "cpu"]
    assert CliRunner().invoke(cli.app, [*arguments, "--pipeline", "sequential"]).exit_code == 0
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    assert [config.pipeline for config in configs] == [PipelineMode.SEQUENTIAL, PipelineMode.OVERLAP]
    assert [config.plan_seconds for config in configs] == [0, 0]
    refused = CliRunner().invoke(cli.app, [*arguments, "--pipeline", "fast"])
    assert "pipeline: input should be 'sequential', 'nanobatch' or 'overlap'" in str(refused.exception)


REFUSAL = "device cpu has no FP8 matrix products: use dtype bfloat16, or a GPU of compute capability 8.9 or later"


@pytest.mark.parametrize("entrance", ["flag", "recipe", "no GPU"])
def test_serve_refuses_fp8_on_a_cpu_before_anything_starts(
    checkpoint: Path, tmp_path: Path, served: list[ServingConfig], monkeypatch: pytest.MonkeyPatch, entrance: str
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {checkpoint}\ndtype: fp8\ndevice: cpu\n")
    arguments = {
        "flag": [str(checkpoint), "--dtype", "fp8", "--device", "cpu"],
        "recipe": [str(recipe)],
        "no GPU": [str(checkpoint), "--dtype", "fp8"],
    }[entrance]
    outcome = CliRunner().invoke(cli.app, ["serve", *arguments])
    assert outcome.exit_code == cli.EXIT_CONFIG
    assert REFUSAL in outcome.stderr.replace("\n", "")
    assert not served


def test_serve_leaves_fp8_to_the_ranks_where_there_may_be_a_gpu(
    checkpoint: Path, served: list[ServingConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    arguments = ["serve", str(checkpoint), "--dtype", "fp8"]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    assert CliRunner().invoke(cli.app, [*arguments, "--device", "cuda", "--kv-cache-dtype", "bfloat16"]).exit_code == 0
    configs = [each.engine_config(DeviceKind.CUDA) for each in served]
    assert [config.product_format for config in configs] == [NumberFormat.FP8] * 2
    assert [config.cache_format for config in configs] == [NumberFormat.FP8, NumberFormat.BFLOAT16]
    refused = CliRunner().invoke(cli.app, [*arguments, "--kv-cache-dtype", "float16"])
    assert refused.exit_code == cli.EXIT_CONFIG
    assert "kv_cache_dtype float16 does not go with activations in bfloat16" in refused.stderr.replace("\n", "")


@pytest.mark.parametrize("option", ["--dtype", "--kv-cache-dtype"])
def test_generate_refuses_fp8_on_a_cpu_in_one_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    arguments = ["generate", str(checkpoint), "Hello", "--raw", "--device", "cpu", option, "fp8"]
    monkeypatch.setattr("sys.argv", ["nanoserve", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == cli.EXIT_CONFIG
    errors = capsys.readouterr().err
    assert "device cpu has no FP8" in errors
    assert "Traceback" not in errors
