"""What kernels and engine do on one CUDA device: right first, then ceilings, then how fast. `make gpu` runs it.

    python benchmarks/gpu.py [--part PART ...] [--seconds 570] [--out DIR] [--schedules DIR]

Needs PyTorch and Triton and nothing else: no network, no Ray, no solver. Every part is a process of its own within its
share of the seconds, so that a kernel that hangs or breaks the device's context costs its part and no other. What is
measured goes to DIR/measured.json, whole every other second and begun anew by every run; a table comes last, also in
DIR/table.txt; the part `profile` adds DIR/profile-*.json to plan with. Exits with 1 where something computed is wrong
or a part did not end, with 2 where nothing can be measured. See docs/GPU.md.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "benchmarks")) if path not in sys.path]

from gpu_parts.part import SECONDS_TO_BEGIN, Part, shares  # noqa: E402
from gpu_parts.results import Results  # noqa: E402

SECONDS = 570.0
OUT_OF_TIME = -1000  # no exit status: those of signals end at -64
_LEAST_CAPABILITY, _LEAST_TORCH, _LEAST_TRITON = (9, 0), (2, 11), (3, 6)
_GRACE_SECONDS = 15.0  # beyond its share, for what a part had begun
_GATHER_SECONDS = 2.0


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
    if arguments.schedules is not None and not arguments.schedules.is_dir():
        print(f"--schedules {arguments.schedules} is not a folder of planned schedules.", file=sys.stderr)
        return 2
    parts = [part for part in Part if arguments.part is None or part in arguments.part]
    with tempfile.TemporaryDirectory(prefix="nanoserve-gpu-") as scratch:
        try:
            folder = None if arguments.out is None else arguments.out.resolve()
            results = Results(Path(scratch) / "parts", folder, parts)
            results.gather()
        except OSError as error:
            print(f"--out {arguments.out} cannot be written to: {error.strerror}.", file=sys.stderr)
            return 2
        return run_parts(results, arguments.seconds, _passed_on(arguments), Path(scratch))


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=Part, choices=list(Part), action="append", help="may be repeated; default: all")
    parser.add_argument("--seconds", type=_seconds, default=SECONDS, help="of all parts together")
    parser.add_argument("--out", type=Path, help="a folder for everything measured; default: only the table is printed")
    parser.add_argument("--schedules", type=Path, help="a folder of planned schedules, to be run")
    parser.add_argument(
        "--seed", type=int, default=time.time_ns() % 2**31, help="of random inputs; default: another one"
    )
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--check-worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, such as {SECONDS:.0f}, but is {text!r}")
    return seconds


def what_is_missing() -> str | None:
    """One line for people, or None where all is there."""
    try:
        import torch
    except ImportError:
        return (
            "make gpu needs PyTorch 2.11 or later built for CUDA; this Python has no torch (PYTHON=... names another)."
        )
    if not torch.cuda.is_available():
        return "make gpu measures an NVIDIA GPU of compute capability 9.0 or later; PyTorch sees none here."
    if (capability := torch.cuda.get_device_capability()) < _LEAST_CAPABILITY:
        return "make gpu measures an NVIDIA GPU of compute capability 9.0 or later; this one has {}.{}.".format(
            *capability
        )
    if _release(torch.__version__) < _LEAST_TORCH:
        return f"make gpu needs PyTorch 2.11 or later; this Python has {torch.__version__} (PYTHON=... names another)."
    try:
        import triton
    except ImportError:
        return "make gpu needs Triton 3.6 or later; this Python has none (PYTHON=... names another)."
    if _release(triton.__version__) < _LEAST_TRITON:
        return f"make gpu needs Triton 3.6 or later; this Python has {triton.__version__} (PYTHON=... names another)."
    return None


def _release(version: str) -> tuple[int, int]:
    """The first two numbers: 2.11.0+cu130 is (2, 11)."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def run_parts(results: Results, seconds: float, passed_on: Sequence[str], scratch: Path) -> int:
    """One after the other; time that a part did not need goes to those that follow."""
    begun = time.monotonic()
    is_right = True
    environment = {"NANOSERVE_CACHE_DIR": str(scratch / "cache"), **os.environ, "PYTHONUNBUFFERED": "1"}
    for index, part in enumerate(results.parts):
        left = seconds - (time.monotonic() - begun)
        share = shares(results.parts[index:], left)[part]
        print(f"\n{part.value}: up to {share:.0f} s", flush=True)
        command = [sys.executable, str(Path(__file__).resolve()), "--inside", "--part", part.value]
        seconds_text = f"{max(share, 0.1):.1f}"  # a part without time says what it left out
        command += ["--out", str(results.inside), "--seconds", seconds_text, "--scratch", str(scratch), *passed_on]
        code = _code_of(subprocess.Popen(command, env=environment), share, results)
        if code not in (0, 1):
            reason = f"was stopped {_GRACE_SECONDS:.0f} s after its {share:.0f} s: out of time"
            results.note_end(part, reason if code == OUT_OF_TIME else f"its process ended with {code}")
            print(f"{part.value} did not come to its end; what it had measured is kept", flush=True)
        is_right &= code == 0
        results.gather(time.monotonic() - begun)
    print("\n" + results.gather(time.monotonic() - begun))
    return 0 if is_right else 1


def _code_of(process: "subprocess.Popen[bytes]", share: float, results: Results) -> int:
    """The exit status of a part; meanwhile what it has measured is kept, should all of this be ended."""
    deadline = time.monotonic() + share + SECONDS_TO_BEGIN + _GRACE_SECONDS
    while True:
        try:
            return process.wait(timeout=max(0.0, min(_GATHER_SECONDS, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            if time.monotonic() >= deadline:
                process.kill()
                process.wait()
                return OUT_OF_TIME
            results.gather()


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
