"""`PaddedSteps`: the few steps of fixed sizes that a rank serves by, as a CUDA graph each where there is CUDA.

One graph serves every mix of decodes and chunks that its bucket holds: what differs is read on the device. There is one
for every size, by the sequential schedule, and one for every size at which batches run by a plan. What has none of its
plan, as that cannot be captured or holds another mix, runs sequentially: launched from Python, overlap would lose more
than it gains.
"""

import logging
from bisect import bisect_left
from dataclasses import dataclass

from engine.batch import Batch
from engine.config import EngineConfig
from engine.errors import first_line
from engine.pipeline.capture import CaptureMemoryError, Captures
from engine.pipeline.lanes import Lanes
from engine.pipeline.nano_batch import Cut
from engine.pipeline.padded_inputs import PaddedInputs
from engine.pipeline.padded_layers import PaddedLayers, PaddedStep
from engine.pipeline.padded_schedule import padded_schedule
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.plan_choice import PlanChoice
from engine.pipeline.schedule import Schedule, ScheduleError
from engine.pipeline.token_bucket import token_sizes
from engine.step_inputs import StepInputs

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedBatch:
    """A batch `dealt` to the nano-batches of a step, which runs it by `schedule`."""

    step: PaddedStep
    dealt: Cut
    schedule: Schedule


class PaddedSteps:
    """Sequential ones from the start; those of plans from `serve` on."""

    def __init__(
        self, layers: PaddedLayers, sequential: Schedule, max_batch_tokens: int, captures: Captures | None
    ) -> None:
        """Without `captures` they are launched operation by operation.

        A size whose graph finds no memory is left out. Raises `CaptureError` where the model waits for the device or
        no graph at all finds memory.
        """
        self._layers = layers
        self._sequential = sequential
        self._captures = captures
        self._max_batch_tokens = max_batch_tokens
        self._whole = {size: layers.sequential(size) for size in token_sizes(max_batch_tokens)}
        self._planned: list[tuple[int, Schedule, PaddedStep]] = []
        if captures is not None:
            self._capture_whole(captures)
        self._sizes = tuple(self._whole)

    @property
    def inputs(self) -> PaddedInputs:
        """To be filled before each run."""
        return self._layers.inputs

    @property
    def num_planned(self) -> int:
        """Steps by plans."""
        return len(self._planned)

    @property
    def most_rows(self) -> int:
        """Of the largest."""
        return self._sizes[-1]

    def gather(self, num_tokens: int) -> StepInputs:
        """What a step with room for so many tokens begins with, to be timed."""
        size = self._sizes[bisect_left(self._sizes, num_tokens)]
        return self._layers.gather(self._whole[size].bucket)

    def serve(self, plans: PlanChoice, lanes: Lanes) -> None:
        """Have steps of the plans instead of those of others, the largest first; those that cannot be had are told.

        Where memory ends, no smaller one is tried.
        """
        self._planned = []
        wanted = [each for each in plans.padded(self._max_batch_tokens) if each[0] != self._sequential]
        for schedule, size, most_decodes in sorted(wanted, key=lambda each: -each[1]):
            try:
                step = self._layers.planned(schedule, size, most_decodes, lanes)
                if self._captures is not None:
                    step.capture(self._captures, self.inputs)
            except ScheduleError as error:
                _log.info("Batches of a plan that are padded to %d tokens run sequentially: %s", size, error)
            except Exception as error:  # `CaptureError`, torch's own, a kernel's that does not fit the device
                _log.warning(
                    "Batches of a plan that are padded to %d tokens run sequentially: %s",
                    size,
                    first_line(error),
                    exc_info=not isinstance(error, RuntimeError),
                )
                if isinstance(error, CaptureMemoryError):
                    return
            else:
                self._planned.append((size, schedule, step))
                if 0 < step.bucket.least_decodes < size:
                    _log.info(
                        "Of a plan's batches of %d tokens those with fewer than %d decodes run sequentially: decodes "
                        "have a nano-batch of their own in it.",
                        size,
                        step.bucket.least_decodes,
                    )

    def of(self, batch: Batch, schedule: Schedule) -> PaddedBatch | None:
        """The step for a batch that is to run by a schedule, by that one if possible; None if it fits none."""
        index = bisect_left(self._sizes, batch.num_tokens)
        if index == len(self._sizes):
            return None
        size = self._sizes[index]
        planned = ((step, by) for rows, by, step in self._planned if rows == size and by == schedule)
        for step, by in (*planned, (self._whole[size], self._sequential)):
            dealt = step.bucket.dealt(batch)
            if dealt is not None:
                return PaddedBatch(step=step, dealt=dealt, schedule=by)
        return None

    def _capture_whole(self, captures: Captures) -> None:
        """The largest first: the others fit into its memory."""
        for size in sorted(self._whole, reverse=True):
            try:
                self._whole[size].capture(captures, self.inputs)
            except CaptureMemoryError as error:
                del self._whole[size]
                if not self._whole:
                    raise
                _log.warning("Steps of %d tokens are no CUDA graph: %s", size, error)


def reserve_padded(config: EngineConfig, pipeline: Pipeline, plans: PlanChoice) -> None:
    """Take the memory between operations that steps by plans will need, before others count what is free.

    A step must have run before.
    """
    for schedule, size, most_decodes in plans.padded(config.max_batch_tokens):
        if schedule != pipeline.sequential:
            try:
                padded = padded_schedule(schedule, pipeline.graph, size, most_decodes, config.max_sequences)
                pipeline.check(padded.schedule)
            except ScheduleError:
                continue  # it is told when the steps are made
            pipeline.reserve([padded.schedule], size)
