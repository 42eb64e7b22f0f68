"""The C++ compiler that makes a CPU's kernels at the first start of a model."""

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cluster.doctor.finding import Finding, ok, warning

CHECK = "compiler"
_SECONDS = 30.0
# What torch's inductor will ask of it: the standard library, and OpenMP.
_PROGRAM = "#include <omp.h>\n#include <vector>\nint f() { return std::vector<int>(omp_get_max_threads()).size(); }\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """`path` None: there is none. `problem`: why it compiles nothing."""

    path: str | None
    problem: str = ""


def read_compiler() -> Compiler:
    """$CXX, else g++, as torch has it; it compiles three lines."""
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name)
    if path is None:
        return Compiler(path=None, problem=f"{name} is not there")
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "probe.cpp"
        source.write_text(_PROGRAM)
        command = [
            path,
            "-std=c++17",
            "-fopenmp",
            "-fPIC",
            "-shared",
            str(source),
            "-o",
            str(source.with_suffix(".so")),
        ]
        try:
            outcome = subprocess.run(
                command, capture_output=True, text=True, timeout=_SECONDS, check=False, errors="replace"
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return Compiler(path=path, problem=str(error))
    lines = outcome.stderr.strip().splitlines() or ["no reason given"]
    return Compiler(path=path, problem="" if outcome.returncode == 0 else lines[0])


def judge_compiler(compiler: Compiler, *, is_wanted: bool) -> Finding:
    """`is_wanted`: the model runs on a CPU, and its recipe does not say `compile: never`."""
    where = compiler.path or "PATH"
    if not is_wanted:
        return ok(CHECK, "Not needed: nothing is compiled for a CPU.", where)
    if compiler.problem:
        return warning(
            CHECK,
            f"No kernels can be compiled for this CPU, which computes slower without them: {compiler.problem}.",
            where,
            "Install one (Debian, Ubuntu: `apt-get install g++`), or say `compile: never` in the recipe.",
        )
    return ok(CHECK, "It compiles for OpenMP.", where)
