"""`StepRecording`: the layers of one step as they really ran on every rank of a group of this machine.

A synthetic batch is run several times, alternately one operation after the other and by the schedule, and the step
of median length is kept with all its events. Ranks of one machine read the same clock, so their events line up.
"""

import statistics
from dataclasses import dataclass, replace

import torch

from engine.batch_shape import BatchShape
from engine.config import DeviceKind, PipelineMode
from engine.errors import ConfigError
from engine.local_group import LocalGroup
from engine.pipeline.lanes import Lanes
from engine.pipeline.placement import CPU_LANES, GPU_LANES, lane_of
from engine.pipeline.plan_choice import SEQUENTIAL
from engine.pipeline.rank_agreement import RankAgreement
from engine.pipeline.schedule import Schedule
from engine.pipeline.stopwatch import Stopwatch
from engine.pipeline.synthetic_step import drawn_rows, synthetic_cache, synthetic_step
from engine.pipeline.timeline import Timeline, TimelineEvent
from engine.recorded_step import in_nano_batch
from engine.worker import Worker

NUM_WARM_UPS = 2


@dataclass(frozen=True, slots=True)
class RankRecording:
    """What one rank saw: of every repetition when its step began by the machine's clock, and its events since then."""

    plan_name: str
    schedule: Schedule
    begins: tuple[float, ...]
    events: tuple[tuple[TimelineEvent, ...], ...]
    sequential_seconds: tuple[float, ...]
    why_sequential: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecording:
    """The step of median length, and the median seconds of a step run sequentially between the others.

    `why_sequential` is for people, where the engine was asked to choose and did not choose to cut the batch.
    """

    plan_name: str
    schedule: Schedule
    timeline: Timeline
    sequential_seconds: float
    why_sequential: str = ""

    @property
    def speedup(self) -> float:
        """How many times as fast as sequential it was."""
        return self.sequential_seconds / self.timeline.seconds

    @property
    def heading(self) -> str:
        """What came out, in a line."""
        recorded = f"recorded: {1e3 * self.timeline.seconds:.4g} ms for the layers of a step, "
        if self.plan_name == SEQUENTIAL:
            return recorded + "run sequentially"
        return recorded + f"{self.speedup:.2f} times as fast as sequential ({1e3 * self.sequential_seconds:.4g} ms)"

    def titled(self, title: str) -> "StepRecording":
        """The same with a title for its drawings."""
        return replace(self, timeline=replace(self.timeline, title=title))

    @classmethod
    def of(
        cls, group: LocalGroup, shape: BatchShape, schedule: Schedule | None, mode: PipelineMode, repetitions: int
    ) -> "StepRecording":
        """Record `group`. `schedule` None: what the engine chose for such batches.

        Raises `ConfigError` where the schedule does not fit the model or the batch.
        """
        ranks = group.run(record_steps, shape, None if schedule is None else str(schedule), mode, repetitions)
        origins = [min(begins) for begins in zip(*(rank.begins for rank in ranks), strict=True)]
        steps = [
            [
                replace(event, start=event.start + late, end=event.end + late)
                for rank in ranks
                for late in [rank.begins[number] - origin]
                for event in rank.events[number]
            ]
            for number, origin in enumerate(origins)
        ]
        steps.sort(key=lambda events: max(event.end for event in events))
        cut = ranks[0].schedule.cut.scaled(int(shape.num_decodes), int(shape.num_prefills))
        timeline = Timeline(
            "", tuple(in_nano_batch(event, cut) for event in steps[len(steps) // 2]), is_predicted=False
        )
        sequential = [max(seconds) for seconds in zip(*(rank.sequential_seconds for rank in ranks), strict=True)]
        return cls(
            plan_name=ranks[0].plan_name,
            schedule=ranks[0].schedule,
            timeline=timeline,
            sequential_seconds=statistics.median(sequential),
            why_sequential=ranks[0].why_sequential,
        )


def record_steps(
    worker: Worker, shape: BatchShape, schedule_text: str | None, mode: PipelineMode, repetitions: int
) -> RankRecording:
    """One rank's part; every rank of a group runs it at the same time."""
    name, schedule = _chosen(worker, shape, schedule_text, mode)
    why = _why_sequential(worker) if name == SEQUENTIAL and mode is not PipelineMode.SEQUENTIAL else ""
    config = worker.config
    pipeline, device = worker.runner.pipeline, torch.device(config.device.value)
    ranks = RankAgreement(worker.tensor_parallel, device)
    num_cached = int(shape.num_decodes * shape.decode_context + shape.num_prefills + shape.prefill_context)
    cache = synthetic_cache(config, num_cached + config.max_model_len, device)
    step = synthetic_step(shape, config.max_model_len, cache, device)

    of_device = pipeline.lanes_on(device)
    one_lane, lanes = of_device.of(overlaps=False), of_device.of(overlaps=mode is PipelineMode.OVERLAP)

    wanted_K = drawn_rows(step)

    def run(plan: Schedule, on: Lanes, stopwatch: Stopwatch) -> None:
        pipeline.run(step, plan, on, stopwatch, wanted_K)
        if device.type == "cuda":
            torch.cuda.synchronize()

    begins: list[float] = []
    events: list[tuple[TimelineEvent, ...]] = []
    sequential: list[float] = []
    with torch.inference_mode():
        for number in range(-NUM_WARM_UPS, repetitions):
            ranks.meet()
            started = Stopwatch.now()
            run(pipeline.sequential, one_lane, Stopwatch())
            seconds = Stopwatch.now() - started
            ranks.meet()
            began = Stopwatch.now()
            stopwatch = Stopwatch(rank=worker.tensor_parallel.rank, records_events=True)
            run(schedule, lanes, stopwatch)
            if number >= 0:
                sequential.append(seconds)
                begins.append(began)
                events.append(tuple(stopwatch.events or ()))
    return RankRecording(name, schedule, tuple(begins), tuple(events), tuple(sequential), why)


def _chosen(worker: Worker, shape: BatchShape, text: str | None, mode: PipelineMode) -> tuple[str, Schedule]:
    """The name and the schedule to run by."""
    batch = int(shape.num_decodes), int(shape.num_prefills)
    if mode is PipelineMode.SEQUENTIAL:
        return SEQUENTIAL, worker.runner.pipeline.sequential
    if text is None:
        return worker.runner.plans.of(*batch)
    schedule = Schedule.parse(text)
    worker.runner.pipeline.check(schedule)
    if not schedule.fits(*batch):
        raise ConfigError(
            f"The schedule is for {schedule.cut.num_decodes} decodes and {schedule.cut.num_prefills} prefill tokens: "
            f"it has no place for a batch of {batch[0]} and {batch[1]}. Choose another share of decodes."
        )
    return "given", schedule


def _why_sequential(worker: Worker) -> str:
    """Why the engine has no other schedule for the batch."""
    lanes = GPU_LANES if worker.config.device is DeviceKind.CUDA else CPU_LANES
    if len({lane_of(node, lanes) for node in worker.runner.pipeline.graph.nodes}) == 1:
        return "nothing of this layer can overlap here"
    if not worker.runner.plans.has_plans:
        return (
            "no plan is stored for this setup; plan one with `nanoserve plan --schedule-out FILE` "
            "and give it with --schedule FILE"
        )
    return "the stored plans have none for such a batch"
