"""The part `throughput`: Llama-3-8B's shapes with random weights through the whole engine, in steady state.

Tokens in and out per second, against the peak of matrix products measured in the same process: sequential in bfloat16
and FP8 at every workload, nano-batches and overlap at the first. Also the share of time in which the device waited for
the host, and where the rest of the optimum went.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_parts.budget import NO_TIME, Budget
from gpu_parts.ledger import Ledger, Row
from gpu_parts.steady_load import SteadyLoad, SteadyResult

from engine.config import DeviceKind, EngineConfig, PipelineMode
from engine.gemm_peak import GemmPeak, measure_gemm_peak
from engine.inline_executor import InlineExecutor
from engine.llm_engine import LLMEngine
from engine.loss import Loss
from engine.model_config import Architecture, DType, ModelConfig
from engine.number_format import NumberFormat
from engine.optimum import optimal_tokens_per_second
from engine.random_checkpoint import sized_config

WORKLOADS = ((1024, 512), (512, 512), (512, 1024), (161, 338))


def llama_8b_shape() -> ModelConfig:
    """Llama-3-8B."""
    return sized_config(
        Architecture.LLAMA,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        vocab_size=128_256,
        max_position_embeddings=8192,
        dtype=DType.BFLOAT16,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to run the engine, and at which workloads."""

    dtype: str
    mode: PipelineMode
    workloads: Sequence[tuple[int, int]]

    @property
    def name(self) -> str:
        return f"{self.dtype} {self.mode.value}"


CONTENDERS = (
    Contender(dtype="bfloat16", mode=PipelineMode.SEQUENTIAL, workloads=WORKLOADS[:1]),
    Contender(dtype="fp8", mode=PipelineMode.SEQUENTIAL, workloads=WORKLOADS[:1]),
    Contender(dtype="bfloat16", mode=PipelineMode.OVERLAP, workloads=WORKLOADS[:1]),
    Contender(dtype="bfloat16", mode=PipelineMode.NANOBATCH, workloads=WORKLOADS[:1]),
    Contender(dtype="bfloat16", mode=PipelineMode.SEQUENTIAL, workloads=WORKLOADS[1:]),
    Contender(dtype="fp8", mode=PipelineMode.SEQUENTIAL, workloads=WORKLOADS[1:]),
    Contender(dtype="fp8", mode=PipelineMode.OVERLAP, workloads=WORKLOADS[:1]),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSizes:
    """How the engine is set up and for how long it is watched. `least_seconds` is what a run is not begun without."""

    device: DeviceKind = DeviceKind.CUDA
    max_batch_tokens: int = 2048
    max_sequences: int = 1408
    num_blocks: int | None = None
    window_seconds: float = 8.0
    warm_seconds: float = 1.5
    fill_seconds: float = 60.0
    least_seconds: float = 50.0


def measure_throughput(
    ledger: Ledger,
    budget: Budget,
    checkpoint: Path,
    sizes: LoadSizes | None = None,
    contenders: Sequence[Contender] = CONTENDERS,
) -> None:
    """In the order of what matters most; an engine that does not start is a row that says why."""
    sizes = sizes or LoadSizes()
    for contender in contenders:
        names = [f"{num_input}/{num_output} {contender.name}" for num_input, num_output in contender.workloads]
        if not budget.has(sizes.least_seconds):
            for name in names:
                ledger.skip("throughput", name, NO_TIME)
            continue
        try:
            asyncio.run(_run(ledger, budget, checkpoint, sizes, contender))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            measured = {row.name for row in ledger.rows}
            for name in names:
                if name not in measured:
                    ledger.skip("throughput", name, reason)


async def _run(ledger: Ledger, budget: Budget, checkpoint: Path, sizes: LoadSizes, contender: Contender) -> None:
    config = EngineConfig(
        model=ModelConfig.from_checkpoint(checkpoint),
        checkpoint=checkpoint,
        dtype=NumberFormat(contender.dtype).dtype,
        product_format=NumberFormat(contender.dtype),
        device=sizes.device,
        max_model_len=max(sum(workload) for workload in contender.workloads),
        max_batch_tokens=sizes.max_batch_tokens,
        max_sequences=sizes.max_sequences,
        num_blocks=sizes.num_blocks,
        prefix_caching=False,
        pipeline=contender.mode,
        plan_seconds=0.0,  # the solver is not on every machine: plans that are stored run, and no others
    )
    executor = InlineExecutor(config)
    engine = LLMEngine(config, executor)
    await engine.start()
    try:
        peak = executor.measure(measure_gemm_peak)
        for num_input, num_output in contender.workloads:
            name = f"{num_input}/{num_output} {contender.name}"
            if not budget.has(sizes.least_seconds / 2):
                ledger.skip("throughput", name, NO_TIME)
                continue
            load = SteadyLoad(engine, config, num_input, num_output, sizes.max_sequences)
            fill_seconds = min(sizes.fill_seconds, budget.left - sizes.window_seconds)
            result = await load.measure(sizes.window_seconds, fill_seconds, sizes.warm_seconds)
            if result is None:
                ledger.skip("throughput", name, f"did not reach a steady state in {fill_seconds:.0f} s")
            else:
                _add_rows(ledger, name, result, peak, config)
    finally:
        await engine.close()


def _add_rows(ledger: Ledger, name: str, result: SteadyResult, peak: GemmPeak, config: EngineConfig) -> None:
    """Tokens per second, the gap between steps, and the waterfall."""
    optimum = optimal_tokens_per_second(peak.flops_per_second, config.model, peak.wide_flops_per_second)
    waterfall = None if result.waterfall is None else result.waterfall.with_optimum(optimum)
    step = 1e3 * result.seconds / max(1, result.num_steps)
    note = (
        f"{result.mean_running:.0f} running, {result.num_steps} steps of {step:.1f} ms, "
        f"filled in {result.fill_seconds:.0f} s; plans {result.num_steps_by_plan or 'none'}"
    )
    details = {
        "gemm_peak_flops_per_second": peak.flops_per_second,
        "mean_running": result.mean_running,
        "num_steps": result.num_steps,
        "output_tokens_per_second": result.num_output_tokens / result.seconds,
        "num_steps_by_plan": result.num_steps_by_plan,
        "loss_waterfall": None if waterfall is None else waterfall.to_json(),
    }
    ledger.add(
        Row(
            group="throughput", name=name, value=result.tokens_per_second, unit="tokens/s", ceiling=optimum, note=note,
            details=details,
        )
    )  # fmt: skip
    if waterfall is not None:
        gap = waterfall.percent(waterfall.seconds[Loss.CPU_GAP])
        ledger.add(Row(group="CPU gap", name=name, value=gap, unit="%", note="of the time, between steps"))
        for title, seconds in waterfall.parts():
            if abs(waterfall.percent(seconds)) >= 0.05:
                ledger.add(
                    Row(
                        group="waterfall", name=f"{name}: {title}", value=waterfall.percent(seconds), unit="%",
                        note=f"{waterfall.tokens_per_second(seconds):,.0f} tokens/s",
                    )
                )  # fmt: skip
