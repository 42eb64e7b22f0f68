"""`make gpu` on a machine without a GPU, and how its entrance runs parts: processes, seconds, files, table."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from gpu_parts.part import Part

ROOT = Path(__file__).parents[2]
STUB = """
import json, pathlib, sys, time
values = dict(zip(sys.argv[1:], sys.argv[2:]))
part, folder = values["--part"], pathlib.Path(values["--out"])
row = {"group": "stub", "name": f"{part} seed {values['--seed']}", "value": 1.0, "is_right": part != "ceilings"}
content = {"rows": [row], "is_complete": part != "co-run"}
(folder / f"{part}.json").write_text(json.dumps(content))
if part == "co-run":
    time.sleep(60)
sys.exit(part == "ceilings")
"""


@pytest.fixture
def gpu() -> ModuleType:
    return importlib.import_module("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["make", "script"])
def test_a_machine_without_a_gpu_is_told_in_one_line_what_is_needed(command: str) -> None:
    commands = {
        "make": ["make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}", "PART=ceilings"],
        "script": [sys.executable, str(ROOT / "benchmarks" / "gpu.py")],
    }
    done = subprocess.run(commands[command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if not line.startswith(("make: ", "make["))]
    assert len(said) == 1 and "NVIDIA GPU" in said[0]


def test_parts_run_in_order_each_within_its_seconds(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    monkeypatch.setattr(gpu, "__file__", str(stub))
    monkeypatch.setattr(gpu, "_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(gpu, "SECONDS_TO_BEGIN", 4.0)
    monkeypatch.setattr(gpu, "what_is_missing", lambda: None)
    out = tmp_path / "out"
    out.mkdir()
    (out / "ceilings.json").write_text(json.dumps({"rows": [{"group": "old", "name": "old"}], "is_complete": True}))
    arguments = ["--part", "ceilings", "--part", "co-run", "--part", "kernels-correct"]
    code = gpu.main([*arguments, "--out", str(out), "--seconds", "9", "--seed", "7"])
    printed = capfd.readouterr().out
    assert code == 1
    assert printed.index("kernels-correct: up to") < printed.index("ceilings: up to") < printed.index("co-run: up to")
    assert "co-run did not come to its end" in printed
    table = (out / "table.txt").read_text()
    assert "kernels-correct seed 7" in table and "co-run (NOT COMPLETE)" in table and "old" not in table
    assert table.strip().splitlines()[-1].startswith("2 WRONG")
    assert printed.rstrip().endswith(table.rstrip())
    assert sorted(path.name for path in out.iterdir()) == [
        "ceilings.json", "co-run.json", "kernels-correct.json", "table.txt",
    ]  # fmt: skip


def test_a_part_that_leaves_no_file_shows_no_figures_of_earlier_runs(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stub = tmp_path / "stub.py"
    stub.write_text("raise SystemExit(5)")
    monkeypatch.setattr(gpu, "__file__", str(stub))
    monkeypatch.setattr(gpu, "what_is_missing", lambda: None)
    (tmp_path / "peers.json").write_text(json.dumps({"rows": [{"group": "old", "name": "old"}], "is_complete": True}))
    assert gpu.main(["--part", "peers", "--out", str(tmp_path)]) == 1
    printed = capfd.readouterr().out
    assert "exit status 5" in printed and "peers (NOT COMPLETE)" in printed and "old" not in printed


def test_every_part_has_a_line_in_the_ledger() -> None:
    ledger = (ROOT / "docs" / "GPU.md").read_text()
    for part in Part:
        assert f"`{part.value}`" in ledger


ABSENT = (
    "ortools", "matplotlib", "platformdirs", "ray", "fastapi", "starlette", "pydantic", "typer", "rich", "uvicorn",
    "uvloop", "prometheus_client", "transformers", "pynvml", "pytest", "yaml", "aiohttp", "httpx", "jinja2", "tqdm",
)  # fmt: skip
IMPORTS = """
import importlib, pathlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
sys.path[:0] = [{root!r}, {benchmarks!r}]
for path in sorted(pathlib.Path({benchmarks!r}, "gpu_parts").glob("*.py")):
    importlib.import_module(f"gpu_parts.{{path.stem}}")
import gpu, gpu_pipeline
from gpu_parts.budget import Budget
from gpu_parts.ledger import Ledger
from gpu_parts.throughput import Contender, LoadSizes, measure_throughput
from engine.config import DeviceKind, PipelineMode
from engine.model_config import Architecture
from engine.random_checkpoint import sized_config, write_random_checkpoint
folder = pathlib.Path(sys.argv[1])
write_random_checkpoint(folder / "model", sized_config(Architecture.LLAMA))
sizes = LoadSizes(device=DeviceKind.CPU, max_batch_tokens=32, max_sequences=4, num_blocks=64, window_seconds=0.3,
                  warm_seconds=0.0, least_seconds=1.0)
contenders = [Contender(dtype="float32", mode=mode, workloads=((8, 8),)) for mode in PipelineMode]
ledger = Ledger("throughput", folder, {{}})
measure_throughput(ledger, Budget(60.0), folder / "model", sizes, contenders)
assert sum(row.group == "throughput" and row.value is not None for row in ledger.rows) == 3, ledger.rows
"""


@pytest.mark.slow
def test_all_of_it_runs_where_only_torch_triton_numpy_and_safetensors_are(tmp_path: Path) -> None:
    """As on a machine to which nothing can be brought."""
    script = IMPORTS.format(absent=set(ABSENT), root=str(ROOT), benchmarks=str(ROOT / "benchmarks"))
    environment = os.environ | {"NANOSERVE_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_run_of_a_part_leaves_a_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is inside a part's process, with the part's work taken out; the checkpoint is made once for all parts."""
    from gpu_parts import large_checkpoint, part_runs, peer_contest, throughput

    made: list[Path] = []
    seen: list[Path] = []

    def write(folder: Path, shape: object) -> None:
        folder.mkdir()
        made.append(folder)

    monkeypatch.setattr(part_runs, "heading", lambda: {"device": "a fake"})
    monkeypatch.setattr(large_checkpoint, "write_large_checkpoint", write)
    monkeypatch.setattr(throughput, "measure_throughput", lambda ledger, budget, folder: seen.append(folder))
    monkeypatch.setattr(peer_contest, "run_contest", lambda ledger, budget, folder: seen.append(folder))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for part in (Part.THROUGHPUT, Part.PEERS):
        assert part_runs.run_part(part, tmp_path, 10.0, None, 1, scratch)
        assert json.loads((tmp_path / f"{part.value}.json").read_text())["is_complete"]
    assert len(made) == 1 and seen == [scratch / "llama-3-8b"] * 2 and seen[0].is_dir()

    def fail(ledger: object, budget: object, folder: Path) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(throughput, "measure_throughput", fail)
    with pytest.raises(RuntimeError):
        part_runs.run_part(Part.THROUGHPUT, tmp_path, 10.0, None, 1, scratch)
    content = json.loads((tmp_path / "throughput.json").read_text())
    assert not content["is_complete"] and "out of memory" in content["rows"][-1]["note"]
