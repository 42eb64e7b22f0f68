"""`TrialSteps`: the padded steps that a batch would be served by, over a synthetic cache, so that a trial times those.

Inputs are gathered from tables as wide as a server's, and rows are padded as there. A schedule that the batch would not
be served by, because it cannot be padded or captured, is timed as what would run instead: the sequential schedule.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.batch_shape import BatchShape
from engine.config import EngineConfig
from engine.kv_cache import KVCache
from engine.pipeline.bucket import DecodeShare
from engine.pipeline.capture import CaptureError, Captures
from engine.pipeline.lanes import Lanes
from engine.pipeline.padded_inputs import packed_step
from engine.pipeline.padded_layers import PaddedLayers, PaddedStep
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.schedule import Schedule, ScheduleError
from engine.pipeline.synthetic_step import synthetic_batch
from engine.pipeline.token_bucket import token_sizes

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrialStep:
    """`fill` says what the next run computes; it takes the same time whatever the schedule, and is not timed."""

    fill: Callable[[], None]
    run: Callable[[], Tensor]


class TrialSteps:
    """Of one batch, by any schedule."""

    def __init__(
        self,
        layers: PaddedLayers,
        batch: Batch,
        sequential: PaddedStep,
        captures: Captures | None,
        device: torch.device,
    ) -> None:
        self._layers = layers
        self._batch = batch
        self._sequential = sequential
        self._captures = captures
        self._device = device

    @classmethod
    def of(
        cls, config: EngineConfig, pipeline: Pipeline, shape: BatchShape, cache: KVCache, captures: Captures | None
    ) -> "TrialSteps | None":
        """None where such batches are launched as large as they are."""
        sizes = token_sizes(config.max_batch_tokens)
        index = bisect_left(sizes, int(shape.num_tokens))
        if not pipeline.reads_lengths_on_device or index == len(sizes):
            return None
        device = cache.keys[0].device
        batch, pool = synthetic_batch(shape, config, cache, device)
        layers = PaddedLayers(config, pipeline, cache, pool)
        step = layers.sequential(sizes[index])
        if step.bucket.dealt(batch) is None:
            return None
        if captures is not None:
            try:
                step.capture(captures, layers.inputs)
            except CaptureError as error:
                _log.warning("%s Steps are timed as they are launched.", error)
                return None
        return cls(layers, batch, step, captures, device)

    def by(self, schedule: Schedule, lanes: Lanes) -> TrialStep:
        """What would run where this schedule is the batch's plan."""
        bucket = self._sequential.bucket
        share = DecodeShare.of(self._batch.num_decodes, self._batch.num_tokens - self._batch.num_decodes)
        try:
            step = self._layers.planned(schedule, bucket.num_tokens, share.most_decodes(bucket.num_tokens), lanes)
            if step.bucket.dealt(self._batch) is None:
                raise ScheduleError("its nano-batches have no room for the batch.")
            if self._captures is not None:
                step.capture(self._captures, self._layers.inputs)
        except (ScheduleError, CaptureError) as error:
            _log.warning("A plan would not be run: %s", error)
            step = self._sequential
        return self._trial_step(step)

    @property
    def sequential(self) -> TrialStep:
        """What runs without a plan."""
        return self._trial_step(self._sequential)

    def _trial_step(self, step: PaddedStep) -> TrialStep:
        batch, inputs = self._batch, self._layers.inputs
        dealt = step.bucket.dealt(batch)
        assert dealt is not None
        rows = np.repeat(batch.rows, batch.counts).astype(np.int64)
        ranges = zip(batch.starts.tolist(), batch.counts.tolist(), strict=True)
        positions = np.concatenate([np.arange(start, start + count) for start, count in ranges])
        packed, _ = packed_step(step.bucket, batch, dealt, rows, positions)
        on_device = torch.from_numpy(packed).to(self._device)
        return TrialStep(fill=lambda: inputs.fill(on_device), run=step.run)
