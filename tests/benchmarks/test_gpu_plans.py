"""The way of a plan: profiled where the GPU is, planned where the solver is, run where the GPU is."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpu_parts.budget import NO_TIME, Budget
from gpu_parts.engine_modes import EngineMode, modes_of
from gpu_parts.layer_profiles import ProfileSizes, measure_profiles, profile_file
from gpu_parts.part import Part
from gpu_parts.planned_schedules import LeftOut, PlannedSchedule, planned_schedules
from gpu_parts.results import Results

from engine.config import EngineConfig, PipelineMode
from engine.model_config import Architecture, DType
from engine.model_shapes import model_shape
from engine.models import build_model
from engine.number_format import NumberFormat
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.planned_model import trace_planned_layer
from engine.pipeline.profile import Profile
from engine.random_checkpoint import sized_config
from engine.tensor_parallel import TensorParallel
from tests.benchmarks.gpu_fakes import quiet_ledger

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = sized_config(Architecture.LLAMA, hidden_size=64, intermediate_size=96)


def profiled(folder: Path) -> Path:
    """A fake of Llama-3-8B's: what a tiny layer costs on this CPU, said to be the large one's."""
    sizes = ProfileSizes(
        model=TINY, formats=(NumberFormat.BFLOAT16,), max_batch_tokens=64, max_sequences=32, max_model_len=128
    )
    ledger = quiet_ledger(folder, "profile")
    measure_profiles(ledger, Budget(6.0), folder, CPU, sizes)
    (row,) = ledger.rows
    assert row.is_right and "profile-llama-3-8b-bfloat16.json" in row.note, row.note
    path = folder / profile_file("llama-3-8b", NumberFormat.BFLOAT16)
    layer = trace_planned_layer(model_shape("llama-3-8b")).graph.signature
    replace(Profile.read(path), layer=layer).write(path)
    return path


@pytest.mark.slow
def test_a_profile_is_planned_and_the_plan_is_run(tmp_path: Path) -> None:
    """Files go there and back; the command is that of docs/GPU.md."""
    inside, out, schedules = tmp_path / "parts", tmp_path / "out", tmp_path / "schedules"
    results = Results(inside, out, [Part.PROFILE])
    profiled(inside)
    results.gather()
    assert (out / "profile-llama-3-8b-bfloat16.json").is_file()
    schedules.mkdir()
    (command,) = (
        line.strip() for line in (ROOT / "docs" / "GPU.md").read_text().splitlines() if "--schedule-out" in line
    )
    command = command.replace("DIR/", f"{out}/").replace("SCHEDULES/", f"{schedules}/") + " --seconds 2"
    words = command.split()
    assert words[:3] == ["python", "-m", "engine"]
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    (planned,) = planned_schedules(schedules)
    assert isinstance(planned, PlannedSchedule) and planned.schedule.cut.num_tokens == 2048
    config = EngineConfig(
        model=TINY, checkpoint=tmp_path, dtype=DType.FLOAT32, max_batch_tokens=2048, max_sequences=1408
    )
    pipeline = Pipeline(build_model(TINY, TensorParallel(), torch.float32, CPU), TINY.hidden_size)
    modes = list(modes_of(pipeline, config, (1024, 512), schedules))
    assert [mode.mode for mode in modes if isinstance(mode, EngineMode)] == [
        PipelineMode.SEQUENTIAL, PipelineMode.OVERLAP, PipelineMode.NANOBATCH,
    ]  # fmt: skip
    plans = planned.plans(2048, 1408)
    assert plans.lookup(677, 1371) is not None and plans.lookup(800, 1000) is not None
    pipeline.check(planned.schedule.scaled(677, 1355))


def test_profiles_of_every_format_share_the_time(tmp_path: Path) -> None:
    ledger = quiet_ledger(tmp_path, "profile")
    measure_profiles(ledger, Budget(0.0), tmp_path, CPU, ProfileSizes(model=TINY))
    assert [(row.name, row.note) for row in ledger.rows] == [
        ("llama-3-8b bfloat16", NO_TIME), ("llama-3-8b fp8", NO_TIME),
    ]  # fmt: skip


def test_what_cannot_be_read_is_left_out_and_said(tmp_path: Path) -> None:
    assert list(planned_schedules(None)) == []
    (empty,) = planned_schedules(tmp_path)
    assert isinstance(empty, LeftOut) and ".schedule" in empty.reason
    (tmp_path / "a.schedule").write_text("# planned\nnano-batches: 2+2\ncompute: qkv_proj[0:4]\n")
    (tmp_path / "b.schedule").write_bytes(b"\xff\xfe")
    (tmp_path / "c.json").write_text("{}")
    (tmp_path / "folder.schedule").mkdir()
    (tmp_path / "d.md").write_text("not looked at")
    one, *others = planned_schedules(tmp_path)
    assert isinstance(one, PlannedSchedule) and one.name == "a" and one.title == "a (streams)"
    left_out = {other.name: other.reason for other in others if isinstance(other, LeftOut)}
    assert list(left_out) == ["b.schedule", "c.json", "folder.schedule"]
    assert left_out["folder.schedule"] == f"{tmp_path / 'folder.schedule'} cannot be read: Is a directory"
