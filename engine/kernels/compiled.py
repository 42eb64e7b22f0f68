"""`CompiledKernels`: kernels compiled ahead for this CPU and kept between runs.

torch's export and AOTInductor make a shared library of a kernel once for all batch sizes: nothing is traced, guarded
or compiled while requests are served, and a call costs 2 to 4 microseconds more than the loops in it, where one through
`torch.compile` costs 15. Compiling takes some ten seconds a kernel and needs a C++ compiler; it happens in processes of
its own. Where it is not possible operations compute as they are written.

Rounding follows the written functions (`emulate_precision_casts`); sums are added in another order, which moves tokens
of narrow number formats as any other kernel does, and those of float32 only where two are as good as equal.
"""

import fcntl
import functools
import hashlib
import inspect
import json
import logging
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from engine.kernels import fused, packed
from engine.kernels.kernel import Argument, Kernel, KernelCall
from engine.kernels.reference import LARGEST_CACHED

_log = logging.getLogger(__name__)

# Of the sizes that differ from call to call, what a kernel is traced with. They decide where it uses several threads.
_EXAMPLES = {"T": 64, "D": 64, "B": 16, "N": 512, "M": 1024, "U": 64, "Q": 48}
_TIMEOUT_SECONDS = 300.0
# Functions that are sums, whose order is the compiler's anyway: products and additions may be one instruction.
_SUMS = ("decode_attention",)


class CompiledKernel:
    """A kernel to be called like one; inputs that lie otherwise than compiled for take the functions as written."""

    def __init__(self, kernel: Kernel, path: Path) -> None:
        """Raises `RuntimeError` where the file cannot be loaded."""
        from torch._C._aoti import AOTIModelPackageLoader

        self.kernel = kernel
        self._expected = [(getattr(torch, each.dtype), len(each.shape)) for each in kernel.arguments]
        # By position: file, name of the model in it, one caller at a time, runners, device index (none).
        self._loader = AOTIModelPackageLoader(str(path), "model", True, 1, -1)
        self._run = self._loader.run

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The kernel's outputs."""
        return self.call(inputs, ())

    def call(self, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Sequence[Tensor]:
        """The kernel's outputs for arguments that end with `weights`, which are known to lie as compiled for."""
        for tensor, (dtype, num_dimensions) in zip(inputs, self._expected, strict=False):
            if tensor.dtype is not dtype or tensor.dim() != num_dimensions or not tensor.is_contiguous():
                return self.kernel(*inputs, *weights)
        outputs: Sequence[Tensor] = self._run([*inputs, *weights])
        return outputs


class CompiledKernels:
    """The kernels in `folder`. Several processes may use one folder; each kernel is compiled by one of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaded: dict[Kernel, CompiledKernel | None] = {}

    def missing(self, kernels: Collection[Kernel]) -> list[Kernel]:
        """Those that are not in the folder yet."""
        return [kernel for kernel in dict.fromkeys(kernels) if not self._path(kernel).exists()]

    def compile(self, kernels: Collection[Kernel]) -> None:
        """Compile what is missing, side by side; what cannot be compiled is left out, with a warning."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _locked(self._folder / "lock"):  # another process may be compiling the same
                running = [(kernel, self._start(kernel)) for kernel in self.missing(kernels)]
                for kernel, process in running:
                    _finish(kernel, process)
        except OSError as error:
            _log.warning("Kernels cannot be compiled into %s: %s.", self._folder, error.strerror)

    def load(self, kernel: Kernel) -> CompiledKernel | None:
        """The kernel if it is in the folder and can be loaded."""
        if kernel not in self._loaded:
            self._loaded[kernel] = self._open(kernel)
        return self._loaded[kernel]

    def _open(self, kernel: Kernel) -> CompiledKernel | None:
        path = self._path(kernel)
        if not path.exists():
            return None
        try:
            return CompiledKernel(kernel, path)
        except (RuntimeError, ImportError) as error:
            _log.warning("%s is of no use and is removed: %s", path, str(error).splitlines()[0])
            path.unlink(missing_ok=True)
            return None

    def _path(self, kernel: Kernel) -> Path:
        return self._folder / f"{kernel.calls[0].function}-{_key(kernel)}.pt2"

    def _start(self, kernel: Kernel) -> "subprocess.Popen[str]":
        """A process that compiles it; one thread each, as several run at the same time."""
        text = json.dumps({"kernel": asdict(kernel), "path": str(self._path(kernel))})
        return subprocess.Popen(
            [sys.executable, "-m", __name__, text],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(self._folder / "inductor")},
        )


def _finish(kernel: Kernel, process: "subprocess.Popen[str]") -> None:
    try:
        _, errors = process.communicate(timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        errors = f"it took more than {_TIMEOUT_SECONDS:.0f} s"
    if process.returncode != 0:
        lines = errors.strip().splitlines() or ["no reason given"]
        _log.warning("%s could not be compiled, and computes as it is written: %s", kernel.name, lines[-1])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _key(kernel: Kernel) -> str:
    """Sixteen hexadecimal digits of everything that the compiled form depends on."""
    modules = (fused, packed, sys.modules[Kernel.__module__], sys.modules[__name__])
    sources = [inspect.getsource(module) for module in modules]
    facts = [asdict(kernel), torch.__version__, _processor(), sources, LARGEST_CACHED]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def _processor() -> str:
    """What code for this machine's own instructions may not be moved beyond."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "unknown")
    return f"{torch.backends.cpu.get_cpu_capability()} {flags}"


def _compile(kernel: Kernel, path: Path) -> None:
    """Export, compile and put in place."""
    import torch._inductor.config as inductor

    inductor.emulate_precision_casts = True
    inductor.assert_indirect_indexing = False  # slots and blocks were given out by our own block manager
    inductor.cpp.dynamic_threads = True  # as many as torch is told to use when it is called
    if all(call.function in _SUMS for call in kernel.calls):
        inductor.cpp.enable_floating_point_contract_flag = "fast"
    examples = tuple(
        torch.zeros(
            [_EXAMPLES[size] if isinstance(size, str) else size for size in argument.shape],
            dtype=getattr(torch, argument.dtype),
        )
        for argument in kernel.arguments
    )
    dynamic = tuple(
        {place: torch.export.Dim.DYNAMIC for place, size in enumerate(argument.shape) if isinstance(size, str)}
        for argument in kernel.arguments
    )
    packed.lower_for_inductor()
    with torch.no_grad():
        exported = torch.export.export(_Function(kernel), examples, dynamic_shapes=(dynamic,))
        temporary = path.with_name(f".{uuid4().hex}.pt2")
        try:
            torch._inductor.aoti_compile_and_package(exported, package_path=str(temporary))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


class _Function(torch.nn.Module):
    """What can be exported."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self._kernel = kernel

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._kernel(*inputs)


def _main(text: str) -> None:
    request: dict[str, Any] = json.loads(text)
    fields = request["kernel"]
    kernel = Kernel(
        tuple(Argument(each["dtype"], tuple(each["shape"])) for each in fields["arguments"]),
        tuple(
            KernelCall(
                each["function"], tuple(each["inputs"]), tuple((name, value) for name, value in each["constants"])
            )
            for each in fields["calls"]
        ),
        tuple(fields["outputs"]),
    )
    _compile(kernel, Path(request["path"]))


if __name__ == "__main__":
    _main(sys.argv[1])
