"""What every part runs, in the process that is its own; and what heads its file."""

import contextlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_parts.bench_device import BenchDevice
from gpu_parts.budget import Budget
from gpu_parts.compile_log import compiled_in
from gpu_parts.ledger import Ledger, Row
from gpu_parts.part import Part
from gpu_parts.power_log import PowerLog, summary


def heading() -> dict[str, Any]:
    """Device, versions, date."""
    import triton

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": torch.cuda.get_device_name(),
        "num_sms": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "versions": (
            f"torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton.__version__}, "
            f"Python {platform.python_version()}"
        ),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def run_part(
    part: Part, folder: Path, seconds: float, schedules: Path | None, seed: int, scratch: Path | None = None
) -> bool:
    """Write the part's file, and say whether nothing in it was wrong. `scratch` is shared by the parts of a run."""
    torch.backends.cuda.matmul.allow_tf32 = False
    if torch.cuda.is_available():  # as an engine's rank does
        torch.backends.cuda.preferred_blas_library("cublaslt")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    budget = Budget(seconds)
    ledger = Ledger(part.value, folder, heading())
    try:
        with _observed(ledger, part):
            _run(part, folder, ledger, budget, schedules, seed, scratch)
    except Exception as error:
        ledger.add(Row(group="ended", name=part.value, is_right=False, note=f"{type(error).__name__}: {error}"))
        ledger.save()
        raise
    ledger.save(is_complete=True)
    return ledger.is_right


@contextlib.contextmanager
def _observed(ledger: Ledger, part: Part) -> Iterator[None]:
    """What is compiled, and clocks and power all the time, become rows at the end."""
    power = PowerLog(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    if power.problem is not None:
        ledger.skip("power", part.value, power.problem)
    with power.recorded() as ledger.logs["power"], compiled_in(ledger, part.value):
        yield
    if entries := ledger.logs["power"]:
        watts = max(entry["watts"] for entry in entries)
        ledger.add(Row(group="power", name=f"{part.value}, most", value=watts, unit="W", note=summary(entries)))


def _run(
    part: Part, folder: Path, ledger: Ledger, budget: Budget, schedules: Path | None, seed: int, scratch: Path | None
) -> None:
    """Imports are here: a part that cannot be imported must not keep the others from running."""
    if part is Part.KERNELS_CORRECT:
        from gpu_parts.check_sizes import FULL
        from gpu_parts.check_worker import CheckPool
        from gpu_parts.kernels_correct import all_checks, check_kernels

        num_workers = max(1, min(10, (os.cpu_count() or 2) - 4))
        check_kernels(ledger, budget, all_checks(FULL), CheckPool(num_workers, ["--check-worker", "--seed", str(seed)]))
    elif part is Part.CEILINGS:
        from gpu_parts.ceilings import measure_ceilings

        with torch.inference_mode():
            measure_ceilings(ledger, budget, BenchDevice.current())
    elif part is Part.KERNELS_FAST:
        from gpu_parts.kernels_fast import measure_kernels

        with torch.inference_mode():
            measure_kernels(ledger, budget, BenchDevice.current())
    elif part is Part.CO_RUN:
        from gpu_parts.co_run import measure_pairs

        with torch.inference_mode():
            measure_pairs(ledger, budget, BenchDevice.current())
    elif part is Part.PIPELINE:
        from gpu_parts.pipeline import run_pipeline

        run_pipeline(ledger, budget, torch.device("cuda", torch.cuda.current_device()), schedules)
    elif part is Part.PROFILE:
        from gpu_parts.layer_profiles import measure_profiles

        measure_profiles(ledger, budget, folder, torch.device("cuda", torch.cuda.current_device()))
    else:
        _run_engine(part, ledger, budget, scratch, schedules, seed)


def _run_engine(
    part: Part, ledger: Ledger, budget: Budget, scratch: Path | None, schedules: Path | None, seed: int
) -> None:
    """Parts that need a folder for checkpoints."""
    with tempfile.TemporaryDirectory(prefix="part-", dir=scratch) as name:
        root = Path(name)
        if part is Part.CORRECTNESS:
            from gpu_parts.correctness import check_engine
            from gpu_parts.graph_checks import check_graphs

            check_engine(ledger, budget.part(0.7), root)
            check_graphs(ledger, budget, root, torch.device("cuda", torch.cuda.current_device()), seed)
            return
        if part is Part.ACCURACY:
            from gpu_parts.accuracy import measure_accuracy

            measure_accuracy(ledger, budget, torch.device("cuda", torch.cuda.current_device()), root)
            return
        from gpu_parts.large_checkpoint import write_large_checkpoint
        from gpu_parts.throughput import llama_8b_shape, measure_throughput

        checkpoint = (scratch or root) / "llama-3-8b"
        if not checkpoint.exists():  # an earlier part of this run has left it
            started = time.monotonic()
            write_large_checkpoint(root / "unfinished", llama_8b_shape())
            shutil.move(root / "unfinished", checkpoint)
            ledger.add(Row(group="checkpoint", name="written in", value=time.monotonic() - started, unit="s"))
        if part is Part.THROUGHPUT:
            measure_throughput(ledger, budget, checkpoint, schedules=schedules)
        else:
            from gpu_parts.peer_contest import run_contest

            run_contest(ledger, budget, checkpoint)
