"""The part `throughput`: Llama-3-8B's shapes with random weights through the whole engine, in steady state.

Tokens in and out per second, against the peak of matrix products measured in the same process: sequential in bfloat16
and FP8 at every workload; nano-batches, and overlap by every schedule or mechanism, at the first. Also the share of
time in which the device waited for the host, and where the rest of the optimum went. An engine that made no CUDA graph,
or whose layers no kernel computes, is wrong, whatever its figure.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_parts.budget import NO_TIME, Budget
from gpu_parts.engine_modes import SEQUENTIAL, EngineMode, modes_of
from gpu_parts.graph_count import GraphCount
from gpu_parts.ledger import Ledger, Row
from gpu_parts.planned_schedules import LeftOut
from gpu_parts.power_log import PowerLog, described
from gpu_parts.steady_load import SteadyLoad
from gpu_parts.throughput_rows import EngineStart, ModeSteps, throughput_rows

from engine.config import DeviceKind, EngineConfig, PipelineMode
from engine.errors import EngineDeadError, NanoserveError
from engine.gemm_peak import GemmPeak, measure_gemm_peak
from engine.inline_executor import InlineExecutor
from engine.llm_engine import LLMEngine
from engine.model_config import Architecture, DType, ModelConfig
from engine.number_format import NumberFormat
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
    """One engine: its number format, the workloads that it is put under, and whether at the first of them other modes
    follow the sequential one.
    """

    dtype: str
    workloads: Sequence[tuple[int, int]]
    has_modes: bool = False


# Filling the cache takes longest, so modes take turns on one engine under one load.
CONTENDERS = (
    Contender(dtype="bfloat16", workloads=WORKLOADS[:1], has_modes=True),
    Contender(dtype="fp8", workloads=WORKLOADS[:1], has_modes=True),
    Contender(dtype="bfloat16", workloads=WORKLOADS[1:]),
    Contender(dtype="fp8", workloads=WORKLOADS[1:]),
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
    num_threads: int | None = None


def measure_throughput(
    ledger: Ledger,
    budget: Budget,
    checkpoint: Path,
    sizes: LoadSizes | None = None,
    contenders: Sequence[Contender] = CONTENDERS,
    schedules: Path | None = None,
) -> None:
    """In the order of what matters most; an engine that does not start is a row that says why. `schedules` is a folder
    of plans for the other modes.
    """
    sizes = sizes or LoadSizes()
    for contender in contenders:
        names = [_name(workload, contender, SEQUENTIAL.name) for workload in contender.workloads]
        if not budget.has(sizes.least_seconds):
            for name in names:
                ledger.skip("throughput", name, NO_TIME)
            continue
        try:
            asyncio.run(_EngineRun(ledger, budget, sizes, contender, schedules).run(checkpoint))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            measured = {row.name for row in ledger.rows}
            for name in names:
                if name not in measured:
                    ledger.add(Row(group="throughput", name=name, is_right=False, note=reason))


def _name(workload: tuple[int, int], contender: Contender, mode: str) -> str:
    return f"{workload[0]}/{workload[1]} {contender.dtype} {mode}"


class _EngineRun:
    """One engine from its start to its end."""

    def __init__(
        self, ledger: Ledger, budget: Budget, sizes: LoadSizes, contender: Contender, schedules: Path | None
    ) -> None:
        self._ledger, self._budget, self._sizes = ledger, budget, sizes
        self._contender, self._schedules = contender, schedules
        self._power = PowerLog()
        self._graphs = GraphCount()

    async def run(self, checkpoint: Path) -> None:
        """A row for every workload and mode."""
        config = self._config(checkpoint)
        told: list[str] = []
        executor = InlineExecutor(config, tell=told.append)
        engine = LLMEngine(config, executor)
        with self._graphs.counting():
            started = time.monotonic()
            await engine.start()
            try:
                start = executor.ask(lambda worker: EngineStart.of(worker, engine.stats(), self._graphs, told))
                self._ledger.add(start.row(self._contender.dtype, time.monotonic() - started))
                peak = executor.measure(measure_gemm_peak)
                for number, workload in enumerate(self._contender.workloads):
                    is_first = number == 0 and self._contender.has_modes
                    await self._at(engine, executor, config, workload, start, peak, with_modes=is_first)
            finally:
                await engine.close()

    def _config(self, checkpoint: Path) -> EngineConfig:
        number_format = NumberFormat(self._contender.dtype)
        return EngineConfig(
            model=ModelConfig.from_checkpoint(checkpoint),
            checkpoint=checkpoint,
            dtype=number_format.dtype,
            product_format=number_format,
            device=self._sizes.device,
            max_model_len=max(sum(workload) for workload in self._contender.workloads),
            max_batch_tokens=self._sizes.max_batch_tokens,
            max_sequences=self._sizes.max_sequences,
            num_blocks=self._sizes.num_blocks,
            num_threads=self._sizes.num_threads,
            prefix_caching=False,
            pipeline=PipelineMode.SEQUENTIAL,
        )

    async def _at(
        self,
        engine: LLMEngine,
        executor: InlineExecutor,
        config: EngineConfig,
        workload: tuple[int, int],
        start: EngineStart,
        peak: GemmPeak,
        *,
        with_modes: bool,
    ) -> None:
        """All modes at one workload, under one load."""
        sizes, budget = self._sizes, self._budget
        name = _name(workload, self._contender, SEQUENTIAL.name)
        if not budget.has(sizes.least_seconds / 2):
            self._ledger.skip("throughput", name, NO_TIME)
            return
        executor.ask(lambda worker: SEQUENTIAL.use(worker, config))
        load = SteadyLoad(engine, config, *workload, sizes.max_sequences)
        try:
            fill_seconds = min(sizes.fill_seconds, budget.left - sizes.window_seconds)
            if not await load.fill(fill_seconds):
                self._ledger.skip("throughput", name, f"did not reach a steady state in {fill_seconds:.0f} s")
                return
            modes: list[EngineMode | LeftOut] = [SEQUENTIAL]
            if with_modes:
                found = executor.ask(
                    lambda worker: list(modes_of(worker.runner.pipeline, config, workload, self._schedules))
                )
                modes = found
            for mode in modes:
                named = _name(workload, self._contender, mode.name)
                if isinstance(mode, LeftOut):
                    self._ledger.skip("throughput", named, f"left out: {mode.reason}")
                elif mode is not SEQUENTIAL and not budget.has(sizes.window_seconds + 2 * sizes.warm_seconds + 2):
                    self._ledger.skip("throughput", named, NO_TIME)
                else:
                    await self._measured(named, load, engine, executor, config, mode, start, peak)
        finally:
            await load.end()

    async def _measured(
        self,
        name: str,
        load: SteadyLoad,
        engine: LLMEngine,
        executor: InlineExecutor,
        config: EngineConfig,
        mode: EngineMode,
        start: EngineStart,
        peak: GemmPeak,
    ) -> None:
        """One window. A mode that cannot be had is a row; an engine that dies ends the run."""
        captured = self._graphs.num_captured
        try:
            await asyncio.to_thread(executor.ask, lambda worker: mode.use(worker, config))
        except (NanoserveError, RuntimeError) as error:
            if isinstance(error, EngineDeadError):
                raise
            note = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            self._ledger.add(Row(group="throughput", name=name, is_right=False, note=note))
            return
        replayed, launched = self._graphs.num_replayed, engine.stats().num_steps
        with self._power.sampled() as readings:
            result = await load.window(self._sizes.window_seconds, self._sizes.warm_seconds)
        steps = ModeSteps(
            is_planned=mode.planned is not None,
            num_captured=self._graphs.num_captured - captured,
            num_replayed=self._graphs.num_replayed - replayed,
            num_steps=engine.stats().num_steps - launched,
            clocks=described(readings),
        )
        for row in throughput_rows(name, result, peak, config, start, steps):
            self._ledger.add(row)
