"""`plan` in FP8: products and cache at their own widths and rates, and no profile of another number format."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from engine import ConfigError
from engine.batch_shape import BatchShape
from engine.cli import app
from engine.model_config import Architecture
from engine.model_shapes import model_shape
from engine.models import build_model
from engine.number_format import NumberFormat
from engine.pipeline.devices import data_sheet
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.planned_model import trace_planned_layer
from engine.pipeline.profile import NodeProfile, Profile, Sample
from engine.pipeline.profile_summary import profile_summary
from engine.pipeline.roofline import RooflineCosts
from engine.random_checkpoint import sized_config
from engine.tensor_parallel import TensorParallel

H200 = data_sheet("h200")
FP8_PEAK, WIDE_PEAK = 1979e12, 989e12
QUICK = ("--model-config", "llama-3-8b", "--device", "h200", "--workload", "1024:512", "--seconds", "0.1")
SIZES = (128, 512, 2048)


def planned(*arguments: str) -> dict[str, Any]:
    outcome = CliRunner().invoke(app, ["plan", *QUICK, *arguments, "--json", "-"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    result: dict[str, Any] = json.loads(outcome.stdout)
    return result


def profiled(folder: Path, number_format: NumberFormat) -> str:
    """A file as a very good device would have it: every operation takes a tenth longer than the data sheet says."""
    traced = trace_planned_layer(model_shape("llama-3-8b"), 1, 0, number_format)
    costs = RooflineCosts(traced, H200, 1, number_format.dtype.num_bytes)
    shapes = [
        BatchShape(num_decodes=size, num_prefills=size, decode_context=1280, prefill_context=512) for size in SIZES
    ]
    profile = Profile(
        fingerprint={"device": "NVIDIA H200, 132 SMs"},
        source="measured on NVIDIA H200",
        number_format=number_format,
        layer=traced.graph.signature,
        nodes={
            node.name: NodeProfile(tuple(Sample(shape, 1.1 * costs.seconds(node, shape)) for shape in shapes))
            for node in traced.graph.nodes
        },
    )
    path = folder / f"{number_format}.json"
    profile.write(path)
    return str(path)


@pytest.mark.parametrize(("number_format", "peak"), [(NumberFormat.FP8, FP8_PEAK), (NumberFormat.BFLOAT16, WIDE_PEAK)])
def test_a_profile_is_planned_against_the_peak_of_its_own_format(
    number_format: NumberFormat, peak: float, tmp_path: Path
) -> None:
    path = profiled(tmp_path, number_format)
    result = planned("--profile", path)
    assert (result["dtype"], result["peak_flops_per_second"]) == (number_format, peak)
    assert result["optimal_tokens_per_second_per_device"] == pytest.approx(peak / (2 * result["layer_parameters"]))
    assert 0 < result["percent_of_optimal"] < 100 / 1.1
    assert planned("--profile", path, "--dtype", number_format.value)["dtype"] == number_format
    assert profile_summary(Profile.read(Path(path))).startswith(f"measured on NVIDIA H200; {number_format}\n")


@pytest.mark.parametrize(("measured", "asked"), [("fp8", "bfloat16"), ("bfloat16", "fp8"), ("bfloat16", "float16")])
def test_a_profile_of_another_number_format_is_refused(measured: str, asked: str, tmp_path: Path) -> None:
    path = profiled(tmp_path, NumberFormat(measured))
    message = (
        f"measured in {measured}, but the plan is to be in {asked}: ask for dtype {measured}, or profile in {asked}"
    )
    with pytest.raises(ConfigError, match=message):
        planned("--profile", path, "--dtype", asked)


def test_an_estimate_in_fp8_has_products_and_keys_of_a_byte() -> None:
    wide, narrow = (
        {row["name"]: row for row in planned("--dtype", dtype)["operations"]} for dtype in ("bfloat16", "fp8")
    )
    assert wide.keys() == narrow.keys()
    assert narrow["gate_up_proj"]["flops"] == wide["gate_up_proj"]["flops"]
    assert narrow["gate_up_proj"]["compute_seconds"] == pytest.approx(
        wide["gate_up_proj"]["compute_seconds"] * WIDE_PEAK / FP8_PEAK, rel=1e-2
    )
    # The context is read in FP8; attention itself is computed as ever.
    assert narrow["decode_attention"]["memory_bytes"] == pytest.approx(
        wide["decode_attention"]["memory_bytes"] / 2, rel=0.01
    )
    assert narrow["decode_attention"]["compute_seconds"] == wide["decode_attention"]["compute_seconds"]
    assert narrow["gate_up_proj"]["seconds"] < wide["gate_up_proj"]["seconds"]


@pytest.mark.parametrize("device", ["a100-80gb", "cpu"])
def test_a_device_without_fp8_is_refused_with_those_that_have_it(device: str) -> None:
    with pytest.raises(ConfigError, match=f"device {device} has no FP8 .* dtype bfloat16, or a device of h100, h200"):
        planned("--device", device, "--dtype", "fp8")


@pytest.mark.parametrize("architecture", [Architecture.LLAMA, Architecture.MIXTRAL])
def test_the_planned_layer_is_that_of_a_model_in_fp8(architecture: Architecture) -> None:
    """So a profile of an engine in FP8 is of the layer that is planned; what is no product of layers stays wide."""
    config, shape = sized_config(architecture), BatchShape(num_decodes=8, num_prefills=8, decode_context=16)
    model = build_model(config, TensorParallel(), torch.bfloat16, torch.device("meta"), in_fp8=True)
    wide, narrow = (trace_planned_layer(config, 1, 0, each) for each in (NumberFormat.BFLOAT16, NumberFormat.FP8))
    assert narrow.graph.signature == Pipeline(model, config.hidden_size).graph.signature
    names = [node.name for node in wide.graph.nodes]
    assert names == [node.name for node in narrow.graph.nodes]
    wide_work, narrow_work = ([traced.work(node, shape, 2) for node in traced.graph.nodes] for traced in (wide, narrow))
    assert [work.flops for work in wide_work] == [work.flops for work in narrow_work]
    assert not any(work.fp8_flops for work in wide_work)
    in_fp8 = {name for name, work in zip(names, narrow_work, strict=True) if work.fp8_flops}
    products = {"gate_up_proj", "down_proj"} if architecture is Architecture.LLAMA else {"experts"}
    assert in_fp8 == {"qkv_proj", "o_proj"} | products


def test_the_weights_that_fit_are_those_in_fp8() -> None:
    """A batch whose weights and keys fit in FP8 alone is not said to be too large."""
    sizes = ("--model-config", "llama-2-70b", "--device", "h200", "--tokens", "256", "--seconds", "0.1")
    notes = []
    for dtype in ("bfloat16", "fp8"):
        outcome = CliRunner().invoke(app, ["plan", *sizes, "--dtype", dtype], catch_exceptions=False)
        assert outcome.exit_code == 0, outcome.output
        notes.append("does not fit" in outcome.stdout)
    assert notes == [True, False]
