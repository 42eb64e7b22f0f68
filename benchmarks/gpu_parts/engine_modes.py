"""`EngineMode`: one of the ways a running engine can take through the layers: sequential, nano-batches, or overlapped
by a schedule, which also says by what mechanism.

Modes are changed between two steps of the same engine under the same load, so that it need not be filled again.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gpu_parts.planned_schedules import LeftOut, PlannedSchedule, planned_schedules
from gpu_pipeline import COMPUTE_SHARE, two_nano_batches

from engine.batch_shape import BatchShape
from engine.config import EngineConfig, PipelineMode
from engine.errors import ConfigError
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.plan_choice import PlanChoice
from engine.pipeline.schedule import Mechanism
from engine.worker import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMode:
    """`planned` None: one operation after the other."""

    mode: PipelineMode
    planned: PlannedSchedule | None = None

    @property
    def name(self) -> str:
        """The mode, and by which schedule."""
        return self.mode.value if self.planned is None else f"{self.mode.value} {self.planned.title}"

    def use(self, worker: Worker, config: EngineConfig) -> None:
        """Have the rank run its steps so from now on; to be called on its thread."""
        runner = worker.runner
        plans = None
        if self.planned is not None:
            plans = self.planned.plans(config.max_batch_tokens, config.max_sequences)
            runner.pipeline.reserve(plans.schedules, config.max_batch_tokens)
        choice = PlanChoice(runner.pipeline.sequential, plans)
        runner.use(choice, overlaps=self.mode is PipelineMode.OVERLAP)


SEQUENTIAL = EngineMode(mode=PipelineMode.SEQUENTIAL)


def modes_of(
    pipeline: Pipeline, config: EngineConfig, workload: tuple[int, int], folder: Path | None
) -> Iterator[EngineMode | LeftOut]:
    """Sequential; every schedule of the folder that the layer can be run by, overlapped, and the first as nano-batches;
    without a folder, halves of a batch of this workload that take turns, by every mechanism.
    """
    yield SEQUENTIAL
    is_first = True
    for planned in planned_schedules(folder) if folder is not None else _halves(pipeline, config, workload):
        if isinstance(planned, LeftOut):
            yield planned
            continue
        try:
            pipeline.check(planned.schedule)
        except ConfigError as error:
            yield LeftOut(name=planned.name, reason=str(error))
            continue
        yield EngineMode(mode=PipelineMode.OVERLAP, planned=planned)
        if is_first:
            yield EngineMode(mode=PipelineMode.NANOBATCH, planned=planned)
        is_first = False


def _halves(pipeline: Pipeline, config: EngineConfig, workload: tuple[int, int]) -> Iterator[PlannedSchedule | LeftOut]:
    """Two nano-batches that share the device as they come, and with most of it for products."""
    num_tokens = config.max_batch_tokens
    num_decodes = min(config.max_sequences, round(BatchShape.steady(num_tokens, *workload).num_decodes))
    plain = two_nano_batches(pipeline.graph, num_decodes, num_tokens - num_decodes)
    shared = two_nano_batches(pipeline.graph, num_decodes, num_tokens - num_decodes, COMPUTE_SHARE)
    yield PlannedSchedule(name="halves", schedule=plain)
    yield PlannedSchedule(name=f"halves, {COMPUTE_SHARE} tenths", schedule=shared)
    for mechanism in Mechanism:
        if mechanism is plain.mechanism:
            continue
        for name, halves in ((f"halves, {COMPUTE_SHARE} tenths", shared), ("halves", plain)):
            schedule = replace(halves, mechanism=mechanism)
            try:
                pipeline.check(schedule)
            except ConfigError as error:
                reason = str(error)
            else:
                yield PlannedSchedule(name=name, schedule=schedule)
                break
        else:
            yield LeftOut(name=f"halves ({mechanism})", reason=reason)
