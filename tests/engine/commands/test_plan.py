"""`plan` through the command line, as a user runs it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine import ConfigError, DeviceKind
from engine.cli import app
from engine.model_config import Architecture
from engine.model_shapes import MODEL_SHAPES
from engine.pipeline import measured_cpu
from engine.pipeline.schedule import Schedule
from engine.random_checkpoint import sized_config, write_random_checkpoint

PAPER_PROFILE = Path(__file__).parents[3] / "deploy/profiles/a100-80gb/llama-2-70b-paper.json"
# A tenth of a second of search: what is tested is not how good the plan is.
QUICK = ("--model-config", "llama-2-70b", "--devices", "8", "--tokens", "1024", "--seconds", "0.1")


@pytest.fixture(autouse=True)
def quick_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine can do is measured as ever, with less work."""
    monkeypatch.setattr(measured_cpu, "SQUARES", {DeviceKind.CPU: (256,)})
    monkeypatch.setattr(measured_cpu, "COPIED_BYTES", 2**22)


def run(*arguments: str) -> str:
    outcome = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout


def planned(*arguments: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run(*arguments, "--json", "-"))
    return result


def test_json_tells_everything_and_is_consistent() -> None:
    result = planned(*QUICK, "--workload", "512:1024")
    assert (result["num_decodes"], result["num_prefills"]) == (683, 341)
    assert 0 < result["lower_bound_seconds"] <= result["planned_seconds"] <= result["sequential_seconds"]
    assert result["speedup"] == pytest.approx(result["sequential_seconds"] / result["planned_seconds"])
    assert result["tokens_per_second_per_device"] == pytest.approx(1024 / result["planned_seconds"] / 8)
    optimum = 312e12 / (2 * result["layer_parameters"])
    assert result["percent_of_optimal"] == pytest.approx(100 * result["tokens_per_second_per_device"] / optimum)
    assert 0 < result["percent_of_optimal"] < 100
    names = {operation["name"] for operation in result["operations"]}
    assert {"qkv_proj", "decode_attention", "feed_forward_all_reduce"} <= names
    # A data sheet prices one operation after the other: the sequential step is their sum.
    assert sum(row["seconds"] for row in result["operations"]) == pytest.approx(result["sequential_seconds"])
    assert {row["bound"] for row in result["operations"]} == {"compute", "memory", "network"}
    assert Schedule.parse(result["schedule"]).cut.num_tokens == 1024
    assert result["solve_seconds"] > 0 and result["peak_source"] == "data sheet"


def test_the_papers_profile_gives_the_papers_sequential_time() -> None:
    result = planned(
        "--model-config", "llama-2-70b", "--devices", "8", "--device", "a100-80gb", "--workload", "512:1024",
        "--profile", str(PAPER_PROFILE), "--seconds", "0.1",
    )  # fmt: skip
    assert result["sequential_seconds"] == pytest.approx(0.225, rel=0.03)
    assert "NanoFlow's measurements" in result["costs"]


def test_sharing_decides_what_running_side_by_side_costs() -> None:
    bounds = [
        planned(*QUICK, "--profile", str(PAPER_PROFILE), "--sharing", sharing)["lower_bound_seconds"]
        for sharing in ("none", "paper")
    ]
    assert bounds[0] < bounds[1]
    assert "no loss" in planned(*QUICK, "--profile", str(PAPER_PROFILE), "--sharing", "none")["costs"]


def test_gathering_is_another_way_and_not_another_operation() -> None:
    both = planned(*QUICK, "--gather")
    only = planned(*QUICK)
    assert [row["name"] for row in both["operations"]] == [row["name"] for row in only["operations"]]
    assert both["sequential_seconds"] == pytest.approx(only["sequential_seconds"])
    assert both["num_partitions"] > only["num_partitions"]


def test_the_summary_has_every_part_and_files_are_written(tmp_path: Path) -> None:
    text = run(
        *QUICK, "--png", str(tmp_path / "a.png"), "--json", str(tmp_path / "a.json"),
        "--schedule-out", str(tmp_path / "a.schedule"),
    )  # fmt: skip
    result = json.loads((tmp_path / "a.json").read_text())
    for part in ("qkv_proj", "network ms", result["schedule"].splitlines()[1], "┌", "lower bound", "gap", "data sheet"):
        assert part in text
    assert "\x1b" not in text  # no colours where nobody sees them
    assert str(Schedule.parse((tmp_path / "a.schedule").read_text())) == result["schedule"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_single_device_and_experts_plan_too() -> None:
    assert planned("--model-config", "llama-3-8b", "--tokens", "1024", "--seconds", "0.1")["num_devices"] == 1
    experts = planned("--model-config", "mixtral-8x7b", "--devices", "8", "--tokens", "1024", "--seconds", "0.1")
    assert experts["percent_of_optimal"] > 0


def test_a_checkpoint_is_planned_on_this_machines_measured_cpu(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, sized_config(Architecture.LLAMA))
    arguments = (str(tmp_path), "--tokens", "64", "--threads", "1", "--seconds", "0.1")
    result = planned(*arguments)
    assert result["device"] == "cpu" and "measured on this machine" in result["peak_source"]
    assert result["model"] == tmp_path.name
    # Here something must be found, on a busy machine too.
    linked = planned(*arguments[:-1], "3", "--devices", "2", "--network", "0.01")
    assert linked["planned_seconds"] < linked["sequential_seconds"]
    with pytest.raises(ConfigError, match="nothing is known of the network"):
        run(*arguments, "--devices", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model-config", "llama-9"), f"No model shape is called 'llama-9'; there are {', '.join(MODEL_SHAPES)}"),
        (("--model-config", "llama-2-70b", "--device", "a101"), "No device is called 'a101'; there are a100-40gb, "),
        (("--model-config", "llama-2-70b", "--devices", "7"), "7 does not divide the model's 64 attention heads"),
        (("--model-config", "llama-2-70b", "--workload", "512"), "--workload is PROMPT:OUTPUT"),
        (("--model-config", "llama-2-70b", "--workload", "0:0"), "--workload is PROMPT:OUTPUT"),
        (("--model-config", "llama-2-70b", "--workload", "-1:9"), "--workload is PROMPT:OUTPUT"),
        ((), "Give either a checkpoint folder or --model-config"),
        ((".", "--model-config", "llama-2-70b"), "Give either a checkpoint folder or --model-config"),
        (
            (*QUICK, "--profile", str(PAPER_PROFILE), "--dtype", "float32"),
            "measured in float16, but the plan is to be in float32: ask for dtype float16, or profile in float32",
        ),
        (
            ("--model-config", "mixtral-8x7b", "--devices", "8", "--dtype", "float16", "--profile", str(PAPER_PROFILE)),
            "The profile .* is of another layer",
        ),
        ((*QUICK, "--profile", str(PAPER_PROFILE), "--gather"), "planned from estimates"),
        ((*QUICK, "--profile", __file__), "test_plan.py"),
        ((*QUICK, "--device", "cpu", "--threads", "1", "--network", "1", "--sharing", "paper"), "CPU do not divide"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_a_reason(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "0"), "--tokens"),
        (("--png", "nowhere/a.png"), "does not exist"),
        (("--png", "a.jpeg2"), "end it in .png"),
        (("--json", "nowhere/a.json"), "does not exist"),
        (("--schedule-out", "."), "is a folder"),
    ],
)
def test_options_that_cannot_be_are_refused_before_the_search(arguments: tuple[str, ...], message: str) -> None:
    environment = {"COLUMNS": "200", "NO_COLOR": "1"}
    outcome = CliRunner().invoke(app, ["plan", "--model-config", "llama-2-70b", *arguments], env=environment)
    assert outcome.exit_code == 2 and message in outcome.output


@pytest.mark.parametrize(
    ("modules", "name"),
    [
        (("ortools", "ortools.linear_solver", "ortools.sat", "ortools.sat.python"), "OR-tools"),
        (("matplotlib",), "matplotlib"),
    ],
)
def test_a_package_that_is_missing_is_named(
    modules: tuple[str, ...], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)  # as where it is not installed
    with pytest.raises(ConfigError, match=f"needs {name}: pip install"):
        run(*QUICK, "--png", str(tmp_path / "a.png"))
