"""Rows of an engine under load: how it started, and what a window of steps was; wrong where it was not what it was
meant to be: layers computed by kernels, and steps replayed from CUDA graphs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from gpu_parts.graph_count import GraphCount
from gpu_parts.ledger import Row
from gpu_parts.steady_load import SteadyResult

from engine.config import DeviceKind, EngineConfig
from engine.gemm_peak import GemmPeak
from engine.loss import Loss
from engine.operation import Operation
from engine.optimum import optimal_tokens_per_second
from engine.stats import EngineStats
from engine.worker import Worker

# Of the steps of a window: those at its borders, and of batches that no graph holds, are launched.
LEAST_REPLAYED = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStart:
    """What an engine was when it had started. Of the operations of a layer, `num_by_kernels` are computed by kernels of
    ours; `told` is what it said.
    """

    is_cuda: bool
    num_graphs: int
    num_blocks: int
    block_size: int
    num_operations: int
    num_by_kernels: int
    told: tuple[str, ...]

    @classmethod
    def of(cls, worker: Worker, stats: EngineStats, graphs: GraphCount, told: Sequence[str]) -> "EngineStart":
        """To be called on the rank's thread."""
        bound = worker.runner.pipeline.program.nodes.values()
        called = [call.operation for node in bound for call in node.calls]
        operations = [operation for operation in called if isinstance(operation, Operation)]
        return cls(
            is_cuda=worker.config.device is DeviceKind.CUDA,
            num_graphs=graphs.num_captured,
            num_blocks=stats.num_blocks,
            block_size=stats.block_size,
            num_operations=len(operations),
            num_by_kernels=sum("forward" in vars(operation) for operation in operations),
            told=tuple(told),
        )

    @property
    def problem(self) -> str:
        """Why its figures would be those of another engine than was meant; empty where nothing is wrong."""
        if not self.is_cuda:
            return ""
        problems = []
        if not self.num_by_kernels:
            problems.append("NO KERNELS USED")
        if not self.num_graphs:
            problems.append("NO CUDA GRAPH")
        return ", ".join(problems)

    @property
    def note(self) -> str:
        """For every row of this engine."""
        return f"{self.num_graphs} graphs, {self.num_blocks:,} blocks of {self.block_size}"

    def row(self, name: str, seconds: float) -> Row:
        """How long the start took, and what came of it."""
        kernels = f"kernels compute {self.num_by_kernels} of a layer's {self.num_operations} operations"
        parts = [self.note, kernels, self.problem, *self.told]
        return Row(
            group="start", name=name, value=seconds, unit="s", is_right=not self.problem if self.is_cuda else None,
            note="; ".join(part for part in parts if part), details=asdict(self),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeSteps:
    """What the steps of a mode became, before its window and in it: `num_captured` graphs were made for it.

    `is_planned`: it has a plan, whose steps are to be graphs, too.
    """

    is_planned: bool
    num_captured: int
    num_replayed: int
    num_steps: int
    clocks: str

    def problem(self, start: EngineStart) -> str:
        """As `EngineStart.problem`."""
        if not start.is_cuda:
            return ""
        if self.is_planned and not self.num_captured:
            return "NO GRAPH OF ITS PLAN: its steps ran sequentially"
        if self.num_replayed < LEAST_REPLAYED * self.num_steps:
            return f"ONLY {self.num_replayed} OF {self.num_steps} STEPS REPLAYED FROM GRAPHS"
        return ""


def throughput_rows(
    name: str, result: SteadyResult, peak: GemmPeak, config: EngineConfig, start: EngineStart, steps: ModeSteps
) -> Iterator[Row]:
    """Tokens per second, the gap between steps, and the waterfall."""
    optimum = optimal_tokens_per_second(peak.flops_per_second, config.model, peak.wide_flops_per_second)
    waterfall = None if result.waterfall is None else result.waterfall.with_optimum(optimum)
    problem = ", ".join(part for part in (start.problem, steps.problem(start)) if part)
    step = 1e3 * result.seconds / max(1, result.num_steps)
    parts = [
        problem,
        f"{result.mean_running:.0f} running, {result.num_steps} steps of {step:.1f} ms",
        f"filled in {result.fill_seconds:.0f} s; plans {result.num_steps_by_plan or 'none'}",
        f"{start.note} and {steps.num_captured} of this mode; {steps.num_replayed} of {steps.num_steps} steps replayed",
        _device_time(result),
        steps.clocks,
        *start.told,
    ]
    yield Row(
        group="throughput", name=name, value=result.tokens_per_second, unit="tokens/s", ceiling=optimum,
        is_right=not problem if start.is_cuda else None, note="; ".join(part for part in parts if part),
        details={
            "gemm_peak_flops_per_second": peak.flops_per_second,
            "mean_running": result.mean_running,
            "num_steps": result.num_steps,
            "output_tokens_per_second": result.num_output_tokens / result.seconds,
            "num_steps_by_plan": result.num_steps_by_plan,
            "step_parts": result.step_parts,
            "steps": asdict(steps),
            "start": asdict(start),
            "loss_waterfall": None if waterfall is None else waterfall.to_json(),
        },
    )  # fmt: skip
    if waterfall is None:
        return
    gap = waterfall.percent(waterfall.seconds[Loss.CPU_GAP])
    yield Row(group="CPU gap", name=name, value=gap, unit="%", note="of the time, between steps")
    for title, seconds in waterfall.parts():
        if abs(waterfall.percent(seconds)) >= 0.05:
            note = f"{waterfall.tokens_per_second(seconds):,.0f} tokens/s"
            yield Row(
                group="waterfall", name=f"{name}: {title}", value=waterfall.percent(seconds), unit="%", note=note
            )  # fmt: skip


def _device_time(result: SteadyResult) -> str:
    """How busy the device was, and with what as far as the engine knows."""
    parts = result.step_parts
    named = {"busy": "device_seconds"}
    if parts.get("num_timed_steps"):
        named |= {"products": "gemm_seconds", "attention": "attention_seconds"}
    shares = (f"{100 * parts[key] / result.seconds:.1f} % {name}" for name, key in named.items())
    return f"device {', '.join(shares)}"
