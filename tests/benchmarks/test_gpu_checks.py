"""The part kernels-correct: its checks pass in the interpreter, a wrong kernel fails them, a dead process costs one."""

import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_parts.check
import pytest
import torch
from gpu_parts import check_worker
from gpu_parts.budget import NO_TIME, Budget
from gpu_parts.check import Check, CheckResult, Outputs, Prepared, evaluate
from gpu_parts.check_sizes import FULL, TINY
from gpu_parts.check_worker import CheckPool
from gpu_parts.kernels_correct import all_checks, check_kernels
from torch import Tensor

from engine.kernels.gpu import decode_config, gemm_config, grouped_gemm_config, prefill_config
from engine.pipeline.capture import CaptureError
from tests.benchmarks.gpu_fakes import quiet_ledger

CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy
def test_every_kernel_is_right_in_the_interpreter() -> None:
    results = [evaluate(check, CPU, 1) for check in all_checks(TINY)]
    assert [(result.name, result.problem) for result in results if result.problem] == []
    kernels = {check.kernel for check in all_checks(TINY)}
    assert kernels == {check.kernel for check in all_checks(FULL)} and len(kernels) == 21


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_candidate_is_right_in_the_interpreter() -> None:
    checks = [check for check in all_checks(replace(TINY, has_all_candidates=True)) if "stages" in check.shape]
    assert len(checks) > 60
    assert [result for check in checks if (result := evaluate(check, CPU, 2)).problem] == []


def test_all_candidates_and_shapes_are_among_the_checks() -> None:
    names = [check.name for check in all_checks(FULL)]
    assert len(set(names)) == len(names)
    for config in (*gemm_config.CANDIDATES, gemm_config.CORESIDENT):
        for kernel in ("gemm bf16", "scaled_gemm fp8"):
            wanted = f"{config.rows}x{config.columns}, {config.num_stages} stages"
            assert any(name.startswith(kernel) and wanted in name for name in names)
    for kernel, configs in (
        ("gated_gemm", grouped_gemm_config.GATED_CANDIDATES), ("scattered_gemm", grouped_gemm_config.PLAIN_CANDIDATES)
    ):  # fmt: skip
        assert sum(name.startswith(kernel) for name in names) == len(configs)
    for width in FULL.head_dims:
        for one in prefill_config.CANDIDATES[width]:
            wanted = f"tile {one.rows}x{one.tile} {one.num_warps} warps {one.num_stages} stages"
            assert any(f"d{width}" in name and wanted in name for name in names)
    tried = [name for name in names if name.startswith("decode_attention bf16") and "stages" in name]
    assert any("104 registers" in name for name in tried)
    assert {decodes.tile for decodes in decode_config.CANDIDATES} == {
        tile for tile in (16, 32, 64, 128) if any(f"tile {tile} " in name for name in tried)
    }
    for group, width, precision in ((1, 64, "fp32"), (4, 128, "fp8"), (8, 64, "bf16")):
        for kernel in ("decode_attention", "prefill_attention"):
            assert any(name.startswith(f"{kernel} {precision} G{group} d{width}") for name in names)
    # Kinds take turns: none is left for last.
    assert len(Counter(check.kernel for check in all_checks(FULL)[:12])) >= 6


def check_of(
    launch: Callable[[], Outputs], expected: Tensor, precision: str = "fp32", buffers: tuple[Tensor, ...] = ()
) -> Check:
    prepared = Prepared(launch=launch, expect=lambda: {"output": expected}, buffers=buffers)
    return Check(kernel="kernel", shape="shape", precision=precision, prepare=lambda device: prepared)


def test_wrong_unwritten_and_raising_kernels_have_a_problem() -> None:
    right = torch.tensor([3.0, 4.0])
    assert evaluate(check_of(lambda: {"output": right * 1.000001}, right), CPU, 0).problem == ""
    result = evaluate(check_of(lambda: {"output": right * 1.001}, right), CPU, 0)
    assert "beyond the tolerances" in result.problem and result.error == pytest.approx(1e-3, rel=1e-2)
    assert evaluate(check_of(lambda: {"output": right * 1.001}, right, "bf16"), CPU, 0).problem == ""
    unwritten = right.clone()
    assert evaluate(check_of(lambda: {"output": unwritten}, right, buffers=(unwritten,)), CPU, 0).error == math.inf
    assert "other" in evaluate(check_of(lambda: {"other": right}, right), CPU, 0).problem
    assert "[3]" in evaluate(check_of(lambda: {"output": torch.ones(3)}, right), CPU, 0).problem
    ids = torch.tensor([1, 2])
    assert evaluate(check_of(lambda: {"output": ids.int()}, ids), CPU, 0).problem == ""
    assert "beyond" in evaluate(check_of(lambda: {"output": ids + 1}, ids), CPU, 0).problem

    def failing() -> Outputs:
        raise RuntimeError("out of resource: shared memory\nand more")

    assert evaluate(check_of(failing, right), CPU, 0).problem == "RuntimeError: out of resource: shared memory"


@pytest.mark.parametrize(("added", "problem"), [(0.0, ""), (1e-7, "replayed from a graph, other bits in output")])
def test_a_replay_must_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, added: float, problem: str) -> None:
    class FakeCaptures:
        def __init__(self, device: Any) -> None:
            self.num_replays = 0

        def capture(self, run: Callable[[], Outputs]) -> Any:
            def replay() -> Outputs:
                outputs = run()
                for tensor in outputs.values():
                    tensor += added
                return outputs

            return SimpleNamespace(replay=replay)

    monkeypatch.setattr(gpu_parts.check, "Captures", FakeCaptures)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    output, right = torch.empty(2), torch.tensor([1.0, 2.0])

    def launch() -> Outputs:
        return {"output": output.copy_(right)}

    device: Any = SimpleNamespace(type="cuda")
    assert evaluate(check_of(launch, right, buffers=(output,)), device, 0).problem == problem

    def refuse(self: Any, run: Callable[[], Outputs]) -> Any:
        raise CaptureError("it waits for the device")

    monkeypatch.setattr(FakeCaptures, "capture", refuse)
    assert evaluate(check_of(launch, right), device, 0).problem == "it waits for the device"


WORKER = """
import json, os, sys, time
for line in sys.stdin:
    number = int(line)
    if number == 1:
        os._exit(3)
    if number == 2:
        time.sleep(60)
    problem = "CUDA error: an illegal memory access" if number == 3 else ""
    print(json.dumps({"name": f"kernel fp32 {number}", "error": 1e-7, "worst": 1e-6, "seconds": 0.1,
                      "problem": problem, "num_compiled": 2, "compile_seconds": 0.5}), flush=True)
"""


def numbered_checks(count: int) -> list[Check]:
    output = torch.ones(1)
    check = check_of(lambda: {"output": output}, output)
    return [replace(check, shape=str(number)) for number in range(count)]


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(check_worker, "ENTRANCE", tmp_path / "worker.py")


@pytest.mark.usefixtures("worker")
def test_a_dead_and_a_hanging_process_cost_one_check_each(tmp_path: Path) -> None:
    ledger = quiet_ledger(tmp_path, "kernels-correct")
    check_kernels(ledger, Budget(60.0), numbered_checks(6), CheckPool(2, [], seconds_per_check=1.5))
    wrong = {row.name: row.note for row in ledger.rows if row.is_right is False and row.is_shown}
    assert "its process ended with 3" in wrong["kernel fp32 1"]
    assert "no answer in 2 s" in wrong["kernel fp32 2"] or "no answer in 1 s" in wrong["kernel fp32 2"]
    assert "illegal memory access" in wrong["kernel fp32 3"]
    assert wrong["kernel fp32"].startswith("3 of 6 right")
    assert sum(row.is_right is True for row in ledger.rows) == 3
    assert ledger.rows[-1].group == "compiled" and ledger.rows[-1].value == pytest.approx(0.5 * 4)
    assert ledger.rows[-1].note.startswith("8 specialisations")
    assert not ledger.is_right


@pytest.mark.usefixtures("worker")
def test_what_there_is_no_time_for_is_left_out_and_not_wrong(tmp_path: Path) -> None:
    ledger = quiet_ledger(tmp_path, "kernels-correct")
    check_kernels(ledger, Budget(0.5), numbered_checks(3), CheckPool(1, []))
    row, compiled = ledger.rows
    assert row.is_right is None and NO_TIME in row.note and ledger.is_right
    assert compiled.group == "compiled" and compiled.note.startswith("0 specialisations")


@pytest.mark.slow
def test_a_worker_evaluates_the_checks_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real loop of a worker, on the CPU."""
    script = tmp_path / "entrance.py"
    script.write_text(
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "import torch\nfrom gpu_parts.check_sizes import TINY\nfrom gpu_parts.check_worker import serve\n"
        "from gpu_parts.kernels_correct import all_checks\n"
        "print('not an answer')\nserve(all_checks(TINY)[:3], torch.device('cpu'), 5)\n"
    )
    monkeypatch.setattr(check_worker, "ENTRANCE", script)
    results: list[CheckResult] = list(CheckPool(1, []).results(all_checks(TINY)[:3], Budget(60.0)))
    assert [result.name for result in results] == [check.name for check in all_checks(TINY)[:3]]
    assert [result.problem for result in results] == ["", "", ""]
