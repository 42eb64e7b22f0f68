"""Compiles Triton kernels for sm_90 ahead of time, without a GPU: what registers and memory they would take.

Tests interpret kernels, and a process that interprets cannot compile: Triton decides when it is imported. So one other
process, without TRITON_INTERPRET, imports the kernels by name and compiles what the tests ask for; it stays for the
session, because importing torch and Triton takes seconds. Requests and answers are lines of JSON.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

REPOSITORY = Path(__file__).resolve().parents[4]
REGISTERS_PER_SM = 65536
SHARED_BYTES_PER_SM = 233472  # 228 KiB, of which the driver takes RESERVED_SHARED_BYTES for each resident CTA
RESERVED_SHARED_BYTES = 1024
LARGEST_SHARED_BYTES = 232448  # of one CTA


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one compiled kernel takes: registers per thread; shared bytes, static and dynamic, per CTA of `num_threads`.

    `warnings` are ptxas's, such as that it had to serialise wgmma instructions.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    num_threads: int
    warnings: list[str]
    ptx: str

    @property
    def cta_registers(self) -> int:
        """Registers of a whole CTA: a warp gets them in units of 256, 8 a thread."""
        return -(-self.registers // 8) * 8 * self.num_threads


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A launch that did not happen: what would have run, on how many CTAs."""

    kernel: str
    grid: tuple[int, ...]
    resources: Resources


class Sm90Compiler:
    """The compiling process; `compiled` and `launches` ask it. Made by the fixture `sm90`."""

    def __init__(self, requests: IO[str], answers: IO[str]) -> None:
        self._requests = requests
        self._answers = answers

    def compiled(
        self,
        kernel: Any,
        signature: Mapping[str, str],
        constants: Mapping[str, object],
        num_warps: int,
        num_stages: int,
        *,
        divisible: Sequence[str] = (),
        maxnreg: int | None = None,
    ) -> Resources:
        """Compile a kernel of a module (the decorated function, or "package.module:name") for sm_90.

        `signature` has Triton's type of every run-time argument by name ("*bf16", "i32", "fp32",
        "tensordesc<bf16[128,64]>"), `constants` the value of every other one; a torch or Triton type is given by its
        name, as "tl.bfloat16". All pointers count as multiples of 16 bytes, and so do the integers named in
        `divisible`, as in a real launch. Raises RuntimeError with the compiler's message.
        """
        name = kernel if isinstance(kernel, str) else f"{kernel.fn.__module__}:{kernel.fn.__qualname__}"
        pointers = [argument for argument, kind in signature.items() if kind.startswith("*")]
        request = {
            "kernel": name,
            "signature": dict(signature),
            "constants": dict(constants),
            "divisible": [*pointers, *divisible],
            "options": {"num_warps": num_warps, "num_stages": num_stages}
            | ({} if maxnreg is None else {"maxnreg": maxnreg}),
        }
        (resources,) = self._ask(name, request)
        return Resources(**resources)

    def launches(self, launcher: Callable[[], object]) -> list[Launch]:
        """Call a function of a module there, with tensors of the CPU, and compile each kernel as it would be launched.

        Types, alignment and constants are then those of the real launch. Nothing runs: outputs hold garbage.
        """
        name = f"{launcher.__module__}:{launcher.__qualname__}"
        answers = self._ask(name, {"launcher": name})
        return [
            Launch(kernel=answer["kernel"], grid=tuple(answer["grid"]), resources=Resources(**answer["resources"]))
            for answer in answers
        ]

    def variants(self, launcher: Callable[[], object]) -> list[str]:
        """Call a function as `launches` does; for each launch say which kernel it would run, of those that Triton makes
        of one function for arguments of other types, sizes and alignments. Nothing is compiled.
        """
        name = f"{launcher.__module__}:{launcher.__qualname__}"
        return [answer["variant"] for answer in self._ask(name, {"launcher": name, "compiles": False})]

    def _ask(self, name: str, request: Mapping[str, object]) -> list[dict[str, Any]]:
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"the compiling process died on {name}; its last words are on stderr")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{name} does not compile for sm_90: {answer['error']}")
        results: list[dict[str, Any]] = answer["results"]
        return results


@contextlib.contextmanager
def sm90_compiler() -> Iterator[Sm90Compiler]:
    """Start the compiling process; it ends with the context."""
    with tempfile.TemporaryDirectory(prefix="nanoserve-sm90-") as cache:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
            "OMP_NUM_THREADS": "1",  # importing torch must not take the other cores
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)]),
            "TRITON_CACHE_DIR": cache,
            "TRITON_ALWAYS_COMPILE": "1",  # what comes from a cache has no compiler's report
            "TRITON_DUMP_PTXAS_LOG": "1",
        }
        process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            yield Sm90Compiler(process.stdin, process.stdout)


def main() -> None:
    """Answer requests until there are no more; whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answer: dict[str, Any]
        try:
            request = json.loads(line)
            answer = {"results": _launches(**request) if "launcher" in request else [_compile(**request)]}
        except Exception as error:  # the test that asked must see it, whatever it is
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _compile(
    kernel: str, signature: dict[str, str], constants: dict[str, Any], divisible: list[str], options: dict[str, int]
) -> dict[str, Any]:
    from triton.compiler import ASTSource

    function = _named(kernel)
    unknown = (signature.keys() | constants.keys()) - set(function.arg_names)
    missing = set(function.arg_names) - (signature.keys() | constants.keys())
    if unknown or missing:
        raise ValueError(f"arguments unknown {sorted(unknown)}, missing {sorted(missing)}")
    kinds = {argument: signature.get(argument, "constexpr") for argument in function.arg_names}
    source = ASTSource(
        function,
        kinds,
        {argument: _constant(value) for argument, value in constants.items()},
        {(function.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in divisible},
    )
    return _resources(source, options)


def _launches(launcher: str, compiles: bool = True) -> list[dict[str, Any]]:
    """What `JITFunction.run` does up to the launch, for every kernel that the function launches."""
    from triton.compiler import ASTSource, make_backend
    from triton.runtime import jit

    launches = []
    backend = make_backend(_target())

    def record(kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        options["debug"] = False
        bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        packed = kernel._pack_args(backend, options, *bind(*arguments, **options))
        launch = {"kernel": kernel.__name__, "grid": grid, "variant": f"{kernel.__name__} {packed}"}
        if compiles:
            launch["resources"] = _resources(ASTSource(kernel, *packed[1:]), packed[0].__dict__)
        launches.append(launch)

    run = jit.JITFunction.run
    jit.JITFunction.run = record
    try:
        _named(launcher)()
    finally:
        jit.JITFunction.run = run
    return launches


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _target() -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", 90, 32)


def _resources(source: Any, options: dict[str, Any]) -> dict[str, Any]:
    import triton

    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        built = triton.compile(source, target=_target(), options=options)
    spilled = _figures(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
    return {
        "registers": max(_figures(r"Used (\d+) registers", log.getvalue())),
        "spill_bytes": sum(spilled),
        "shared_bytes": built.metadata.shared + sum(_figures(r"(\d+) bytes smem", log.getvalue())),
        "num_threads": max(_figures(r"\.(?:reqntid|maxntid)\s+(\d+)", built.asm["ptx"])),
        "warnings": [line for line in log.getvalue().splitlines() if "warning" in line.lower() or "Loss" in line],
        "ptx": built.asm["ptx"],
    }


def _constant(value: object) -> object:
    """The types of Triton's language travel by name."""
    import triton.language

    if isinstance(value, str) and value.startswith("tl."):
        return getattr(triton.language, value.removeprefix("tl."))
    return value


def _figures(pattern: str, report: str) -> list[int]:
    """All numbers that a pattern finds, at least one: a report of another form must not read as zero."""
    found = [int(figure) for figure in re.findall(pattern, report)]
    if not found and "smem" not in pattern:  # a kernel without static shared memory has no such line
        raise ValueError(f"the compiler's report has no {pattern!r}: {report[:2000]}")
    return found


if __name__ == "__main__":
    main()
