"""`Check`: one kernel at one shape against a plain computation in float64, launched and replayed from a graph.

Errors are relative: of the norms, ||given - expected|| / ||expected||, and of the worst element, against the largest
one expected. Tokens and ids must be equal. NaN, which every output holds before the launch, passes nowhere.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.pipeline.capture import CaptureError, Captures

Outputs = Mapping[str, Tensor]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}
# By the precision of what is computed: error of the norm, of the worst element. "e4m3" are quantised results.
TOLERANCES = {"fp32": (2e-5, 1e-4), "bf16": (8e-3, 2e-2), "fp8": (8e-3, 2e-2), "e4m3": (4e-2, 8e-2)}
SMALLEST_EQUAL_SHARE = 0.999  # of drawn tokens: two best scores may be closer than logarithms are exact


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """`launch` computes with inputs of its own, `expect` the same in float64 (or ids), by the names of the outputs.

    `buffers` are outputs that the caller gave, to be spoilt before every launch.
    """

    launch: Callable[[], Outputs]
    expect: Callable[[], Outputs]
    buffers: Sequence[Tensor] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """`precision` names the tolerance; `prepare` draws fresh inputs on a device."""

    kernel: str
    shape: str
    precision: str
    prepare: Callable[[torch.device], Prepared]

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.precision} {self.shape}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """`problem` is empty where everything is right. Kernels were compiled in `compile_seconds` of the `seconds`."""

    name: str
    error: float
    worst: float
    seconds: float
    problem: str = ""
    num_compiled: int = 0
    compile_seconds: float = 0.0


def evaluate(check: Check, device: torch.device, seed: int) -> CheckResult:
    """Run it; whatever is raised becomes the problem."""
    started = time.monotonic()
    error = worst = math.nan
    try:
        torch.manual_seed(seed)
        with torch.inference_mode():
            prepared = check.prepare(device)
            _spoil(prepared.buffers)
            given = {name: tensor.clone() for name, tensor in prepared.launch().items()}
            error, worst = _errors(given, prepared.expect())
            problem = _verdict(check.precision, error, worst)
            if not problem and device.type == "cuda":
                problem = _replayed_problem(prepared, given, device)
    except Exception as failure:
        problem = f"{type(failure).__name__}: {failure}".splitlines()[0][:300]
    return CheckResult(name=check.name, error=error, worst=worst, seconds=time.monotonic() - started, problem=problem)


def _errors(given: Outputs, expected: Outputs) -> tuple[float, float]:
    """The largest of all outputs."""
    if given.keys() != expected.keys():
        raise ValueError(f"outputs are {sorted(given)}, expected {sorted(expected)}")
    errors = [_error(given[name], expected[name]) for name in expected]
    return max(error for error, _ in errors), max(worst for _, worst in errors)


def _error(given: Tensor, expected: Tensor) -> tuple[float, float]:
    if given.shape != expected.shape:
        raise ValueError(f"an output is {list(given.shape)}, where {list(expected.shape)} is right")
    if not expected.is_floating_point():
        unequal = (given.long() != expected.to(given.device).long()).double().mean().item() if given.numel() else 0.0
        return (0.0, 0.0) if unequal <= 1 - SMALLEST_EQUAL_SHARE else (math.inf, unequal)
    if not given.numel():
        return 0.0, 0.0
    wanted = expected.double()
    difference = given.to(wanted.device).double() - wanted
    largest, norm = float(wanted.abs().max()), float(wanted.norm())
    error, worst = float(difference.norm()) / (norm or 1.0), float(difference.abs().max()) / (largest or 1.0)
    return (math.inf if math.isnan(error) else error), (math.inf if math.isnan(worst) else worst)


def _verdict(precision: str, error: float, worst: float) -> str:
    largest_error, largest_worst = TOLERANCES[precision]
    if error <= largest_error and worst <= largest_worst:
        return ""
    return f"beyond the tolerances {largest_error:.0e} and {largest_worst:.0e}"


def _replayed_problem(prepared: Prepared, given: Outputs, device: torch.device) -> str:
    """A replayed graph must give the bits of the launch."""
    try:
        captured = Captures(device).capture(prepared.launch)
    except CaptureError as error:
        return str(error)
    _spoil([*prepared.buffers, *captured.replay().values()])
    replayed = captured.replay()
    torch.cuda.synchronize(device)
    different = [name for name, tensor in replayed.items() if not torch.equal(_bits(tensor), _bits(given[name]))]
    return f"replayed from a graph, other bits in {', '.join(different)}" if different else ""


def _spoil(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if tensor.dtype is torch.float8_e4m3fn:
            tensor.view(torch.uint8).fill_(0x7F)
        else:
            tensor.fill_(math.nan if tensor.is_floating_point() else -7)


def _bits(tensor: Tensor) -> Tensor:
    """Comparable whatever the numbers: NaN is unequal to itself, and e4m3 is not compared everywhere."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])
