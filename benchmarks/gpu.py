"""What kernels and engine do on one CUDA device: right first, then ceilings, then how fast. `make gpu` runs it.

    python benchmarks/gpu.py [--part PART ...] [--seconds 570] [--out DIR] [--schedules DIR]

Needs PyTorch and Triton and nothing else: no network, no Ray, no solver. Every part is a process of its own within its
share of the seconds, so that a kernel that hangs or breaks the device's context costs its part and no other. What is
measured goes to DIR/PART.json, whole after every row and begun anew by every run; a table comes last. Exits with 1
where something computed is wrong or a part did not end, with 2 where nothing can be measured. See docs/GPU.md.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "benchmarks")) if path not in sys.path]

from gpu_parts.ledger import rows_of  # noqa: E402
from gpu_parts.part import SECONDS_TO_BEGIN, Part, shares  # noqa: E402

SECONDS = 570.0
_GRACE_SECONDS = 15.0  # beyond its share, for what a part had begun


def main(given: Sequence[str] | None = None) -> int:
    """Run the chosen parts."""
    arguments = _arguments(given)
    missing = what_is_missing()
    if missing is not None:
        print(missing, file=sys.stderr)
        return 2
    if arguments.check_worker:
        return _serve_checks(arguments.seed)
    if arguments.inside:
        from gpu_parts.part_runs import run_part

        (part,) = arguments.part
        given_to_it = arguments.out, arguments.seconds, arguments.schedules, arguments.seed, arguments.scratch
        return 0 if run_part(part, *given_to_it) else 1
    parts = [part for part in Part if arguments.part is None or part in arguments.part]
    with tempfile.TemporaryDirectory(prefix="nanoserve-gpu-") as scratch:
        folder = arguments.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for part in parts:  # a figure of an earlier run must not pass for one of this
            (folder / f"{part.value}.json").unlink(missing_ok=True)
        return run_parts(parts, folder.resolve(), arguments.seconds, _passed_on(arguments), Path(scratch))


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=Part, choices=list(Part), action="append", help="may be repeated; default: all")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all parts together")
    parser.add_argument("--out", type=Path, help="a folder for everything measured; default: only the table is kept")
    parser.add_argument("--schedules", type=Path, help="a folder of planned schedules for the pipeline part")
    parser.add_argument(
        "--seed", type=int, default=time.time_ns() % 2**31, help="of random inputs; default: another one"
    )
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--check-worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def what_is_missing() -> str | None:
    """One line for people, or None where all is there."""
    try:
        import torch
    except ImportError:
        return (
            "make gpu needs PyTorch 2.11 or later built for CUDA; this Python has no torch (PYTHON=... names another)."
        )
    if not torch.cuda.is_available():
        return "make gpu measures an NVIDIA GPU of compute capability 9.0 or similar; PyTorch sees none here."
    try:
        import triton  # noqa: F401
    except ImportError:
        return "make gpu needs Triton 3.6 or later; this Python has none (PYTHON=... names another)."
    return None


def run_parts(parts: Sequence[Part], folder: Path, seconds: float, passed_on: Sequence[str], scratch: Path) -> int:
    """One after the other; time that a part did not need goes to those that follow."""
    begun = time.monotonic()
    is_right = True
    environment = {"NANOSERVE_CACHE_DIR": str(scratch / "cache"), **os.environ, "PYTHONUNBUFFERED": "1"}
    for index, part in enumerate(parts):
        left = seconds - (time.monotonic() - begun)
        share = shares(parts[index:], left)[part]
        print(f"\n{part.value}: up to {share:.0f} s", flush=True)
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--inside",
            "--part",
            part.value,
            "--out",
            str(folder),
        ]
        process = subprocess.Popen(
            [*command, "--seconds", f"{share:.1f}", "--scratch", str(scratch), *passed_on], env=environment
        )
        try:
            code = process.wait(timeout=share + SECONDS_TO_BEGIN + _GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = -9
        if code not in (0, 1):
            print(
                f"{part.value} did not come to its end (exit status {code}); what it had measured is kept", flush=True
            )
        is_right &= code == 0
    lines = table(parts, folder, time.monotonic() - begun)
    (folder / "table.txt").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))
    return 0 if is_right else 1


def table(parts: Sequence[Part], folder: Path, seconds: float) -> list[str]:
    """Every row that is shown, part by part, and a verdict."""
    lines: list[str] = []
    num_wrong = 0
    for part in parts:
        rows, is_complete = rows_of(folder / f"{part.value}.json")
        lines += ["", f"{part.value}{'' if is_complete else ' (NOT COMPLETE)'}"]
        lines += [row.line() for row in rows if row.is_shown]
        num_wrong += sum(row.is_right is False for row in rows) + (not is_complete)
    lines += ["", f"{'everything checked is right' if not num_wrong else f'{num_wrong} WRONG'}; {seconds:.0f} s"]
    return lines


def _passed_on(arguments: argparse.Namespace) -> list[str]:
    schedules = [] if arguments.schedules is None else ["--schedules", str(arguments.schedules.resolve())]
    return ["--seed", str(arguments.seed), *schedules]


def _serve_checks(seed: int) -> int:
    import torch
    from gpu_parts.check_sizes import FULL
    from gpu_parts.check_worker import serve
    from gpu_parts.kernels_correct import all_checks

    torch.backends.cuda.matmul.allow_tf32 = False
    serve(all_checks(FULL), torch.device("cuda", torch.cuda.current_device()), seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
