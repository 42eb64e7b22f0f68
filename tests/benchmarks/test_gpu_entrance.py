"""`make gpu` on a machine without a GPU, and how its entrance runs parts: processes, seconds, files, table."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from gpu_parts.part import COMMON_GROUPS, GROUPS, Part, shares
from gpu_parts.results import Results

from tests.benchmarks.gpu_fakes import quiet_ledger

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


@pytest.mark.parametrize(
    ("capability", "torch_version", "triton_version", "said"),
    [
        ((9, 0), "2.11.0+cu130", "3.6.0", None),
        ((10, 0), "2.13.1", "3.10.2", None),
        ((8, 0), "2.11.0", "3.6.0", "this one has 8.0"),
        ((9, 0), "2.4.0", "3.6.0", "this Python has 2.4.0"),
        ((9, 0), "2.11.0", "3.5.1", "this Python has 3.5.1"),
    ],
)
def test_an_old_gpu_or_library_is_told_at_once(
    gpu: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    torch_version: str,
    triton_version: str,
    said: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=triton_version))
    missing = gpu.what_is_missing()
    assert missing is None if said is None else missing is not None and said in missing


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
    (out / "measured.json").write_text("old")
    (out / "profile-old.json").write_text("of a run of another part, to plan from")
    arguments = ["--part", "ceilings", "--part", "co-run", "--part", "kernels-correct"]
    code = gpu.main([*arguments, "--out", str(out), "--seconds", "9", "--seed", "7"])
    printed = capfd.readouterr().out
    assert code == 1
    assert printed.index("kernels-correct: up to") < printed.index("ceilings: up to") < printed.index("co-run: up to")
    assert "co-run did not come to its end" in printed
    table = (out / "table.txt").read_text()
    assert "kernels-correct seed 7" in table and "co-run (NOT COMPLETE)" in table and "old" not in table
    assert "stopped" in table and "out of time" in table, "a part that ran out of time says so"
    assert table.strip().splitlines()[-1].startswith("1 WRONG, 1 parts NOT COMPLETE")
    assert printed.rstrip().endswith(table.rstrip())
    assert sorted(path.name for path in out.iterdir()) == ["measured.json", "profile-old.json", "table.txt"]
    parts = json.loads((out / "measured.json").read_text())["parts"]
    assert list(parts) == ["kernels-correct", "ceilings", "co-run"]
    assert parts["co-run"]["rows"][0]["name"] == "co-run seed 7", "what it had measured is kept"
    assert parts["co-run"]["rows"][1]["group"] == "ended"


def test_a_part_that_leaves_no_file_shows_no_figures_of_earlier_runs(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stub = tmp_path / "stub.py"
    stub.write_text("raise SystemExit(5)")
    monkeypatch.setattr(gpu, "__file__", str(stub))
    monkeypatch.setattr(gpu, "what_is_missing", lambda: None)
    (tmp_path / "measured.json").write_text(json.dumps({"parts": {"peers": {"rows": [], "is_complete": True}}}))
    assert gpu.main(["--part", "peers", "--out", str(tmp_path)]) == 1
    printed = capfd.readouterr().out
    assert "ended with 5" in printed and "peers (NOT COMPLETE)" in printed
    (row,) = json.loads((tmp_path / "measured.json").read_text())["parts"]["peers"]["rows"]
    assert row["group"] == "ended" and row["is_right"] is False


def test_results_are_kept_while_a_part_runs(tmp_path: Path) -> None:
    """Should everything be ended at once, what there was is there."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "profile-old.json").write_text("old")
    results = Results(tmp_path / "inside", tmp_path / "out", [Part.PROFILE])
    assert not list((tmp_path / "out").iterdir()), "no profile of an earlier run stays"
    assert "profile (NOT COMPLETE)" in results.gather()
    ledger = quiet_ledger(results.inside, "profile")
    ledger.skip("profile", "half", "way")
    ledger.save()
    (results.inside / "profile-model-fp8.json").write_text("{}")
    results.gather()
    (row,) = json.loads((tmp_path / "out" / "measured.json").read_text())["parts"]["profile"]["rows"]
    assert row["name"] == "half" and (tmp_path / "out" / "profile-model-fp8.json").is_file()
    assert "half" in (tmp_path / "out" / "table.txt").read_text()
    assert Results(tmp_path / "other", None, [Part.PEERS]).gather(3.0).endswith("; 3 s"), "without a folder"


def test_tests_for_gpus_run_by_a_python_of_ones_own_too() -> None:
    """Those of two GPUs are among them, and named in the ledger by what runs them alone."""
    words = TWO_GPUS.split("`")[1].split()
    done = subprocess.run(
        [*words, "-n", "--no-print-directory", "PYTHON=python3"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == 'python3 -m pytest -m "gpu or multi_gpu" tests/engine/test_two_ranks.py'
    assert "pytest.mark.multi_gpu" in (ROOT / "tests/engine/test_two_ranks.py").read_text()
    assert sum(row[-2] == TWO_GPUS for row in ledger_rows()) == 2


@pytest.mark.parametrize("seconds", ["-5", "0", "nan", "inf", "soon"])
def test_seconds_that_are_none_are_refused(gpu: ModuleType, seconds: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        gpu.main([f"--seconds={seconds}"])
    assert refused.value.code == 2
    assert f"--seconds: must be a number of seconds above 0, such as 570, but is '{seconds}'" in capfd.readouterr().err


@pytest.mark.parametrize("is_file", [False, True])
def test_a_folder_that_cannot_be_written_is_refused(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], is_file: bool
) -> None:
    monkeypatch.setattr(gpu, "what_is_missing", lambda: None)
    out = tmp_path / "file" if is_file else Path("/proc/nope")
    (tmp_path / "file").touch()
    assert gpu.main(["--part", "peers", "--out", str(out)]) == 2
    assert f"--out {out} cannot be written to: " in capfd.readouterr().err


def test_a_folder_of_schedules_is_passed_on_or_refused(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stub = tmp_path / "stub.py"
    stub.write_text("import sys; print(*sys.argv[1:])")
    monkeypatch.setattr(gpu, "__file__", str(stub))
    monkeypatch.setattr(gpu, "what_is_missing", lambda: None)
    assert gpu.main(["--part", "pipeline", "--schedules", str(tmp_path / "absent")]) == 2
    assert "absent is not a folder" in capfd.readouterr().err
    gpu.main(["--part", "pipeline", "--schedules", str(tmp_path)])
    assert f"--schedules {tmp_path}" in capfd.readouterr().out
    shown = ["make", "--no-print-directory", "-n", "gpu", "PYTHON=python3", "PART=pipeline throughput", "SCHEDULES=a b"]
    done = subprocess.run(shown, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert 'gpu.py --part pipeline --part throughput --schedules "a b"' in done.stdout


TWO_GPUS = "`make test-gpu ARGS=tests/engine/test_two_ranks.py` with two GPUs"
# | claim | ... | `part` | `rows` | command | last measured |
CELLS = re.compile(r"(?<!\\)\|")


def ledger_rows() -> list[list[str]]:
    """Cells of the ledger's tables of figures: claim, (target,) part, rows, command, last measured."""
    tables = (ROOT / "docs" / "GPU.md").read_text().partition("## Kernels and graphs are right")[2]
    lines = [line for line in tables.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in CELLS.split(line)[1:-1]] for line in lines]
    return [row for row in cells if row[0] != "claim" and not set(row[0]) <= {"-"}]


def test_every_row_of_the_ledger_names_a_part_that_has_such_rows() -> None:
    parts = {part.value for part in Part}
    for *_, part, groups, command, _ in ledger_rows():
        named = re.findall(r"`([^`]+)`", part)
        if part == "every part":
            assert set(re.findall(r"`([^`]+)`", groups)) <= set(COMMON_GROUPS) and command == "every command"
        elif part == "none":
            assert not groups and command in ("`make test-gpu`", TWO_GPUS)
        else:
            (name,) = named
            assert name in parts
            assert set(re.findall(r"`([^`]+)`", groups)) <= set(GROUPS[Part(name)]), (name, groups)
            assert f'make gpu PART="{name}"' in command, command


def test_every_group_of_a_part_s_rows_is_in_the_ledger() -> None:
    named = {
        (part.strip("`"), group)
        for *_, part, groups, _, _ in ledger_rows()
        for group in re.findall(r"`([^`]+)`", groups)
    }
    assert set(GROUPS) == set(Part)
    for part, groups in GROUPS.items():
        for group in groups:
            assert (part.value, group) in named, f"docs/GPU.md has no row for {group} of {part.value}"
    assert {group for part, group in named if part == "every part"} == set(COMMON_GROUPS) - {"ended"}
    text = (ROOT / "docs" / "GPU.md").read_text()
    assert all(f"| `{part.value}` | {seconds:.0f} |" in text for part, seconds in shares(list(Part), 570.0).items())


def test_a_figure_in_the_ledger_has_a_date_and_versions() -> None:
    """Or there is none yet."""
    for *_, last in ledger_rows():
        assert last == "not yet measured" or re.search(r"\d{4}-\d{2}-\d{2}.*torch \d", last), last


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
from engine.config import DeviceKind
from engine.model_config import Architecture
from engine.random_checkpoint import sized_config, write_random_checkpoint
folder = pathlib.Path(sys.argv[1])
write_random_checkpoint(folder / "model", sized_config(Architecture.LLAMA))
sizes = LoadSizes(device=DeviceKind.CPU, max_batch_tokens=32, max_sequences=4, num_blocks=64, window_seconds=0.3,
                  warm_seconds=0.0, least_seconds=1.0, num_threads=1)
contenders = [Contender(dtype="float32", workloads=((8, 8),), has_modes=True)]
ledger = Ledger("throughput", folder, {{}})
measure_throughput(ledger, Budget(60.0), folder / "model", sizes, contenders)
assert sum(row.group == "throughput" and row.value is not None for row in ledger.rows) >= 4, ledger.rows
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
    monkeypatch.setattr(throughput, "measure_throughput", lambda ledger, budget, folder, schedules: seen.append(folder))
    monkeypatch.setattr(peer_contest, "run_contest", lambda ledger, budget, folder: seen.append(folder))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for part in (Part.THROUGHPUT, Part.PEERS):
        assert part_runs.run_part(part, tmp_path, 10.0, None, 1, scratch)
        assert json.loads((tmp_path / f"{part.value}.json").read_text())["is_complete"]
    assert len(made) == 1 and seen == [scratch / "llama-3-8b"] * 2 and seen[0].is_dir()

    def fail(ledger: object, budget: object, folder: Path, schedules: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(throughput, "measure_throughput", fail)
    with pytest.raises(RuntimeError):
        part_runs.run_part(Part.THROUGHPUT, tmp_path, 10.0, None, 1, scratch)
    content = json.loads((tmp_path / "throughput.json").read_text())
    assert not content["is_complete"] and "out of memory" in content["rows"][-1]["note"]
