"""`TrialSteps`: the padded steps that a batch would be served by, over a synthetic cache, so that a trial times those.

Inputs are gathered from tables as wide as a server's, and rows are padded as there. A schedule that the batch would not
be served by, because it cannot be padded or captured, is timed as what would run instead: the sequential schedule.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.batch_shape import BatchShape
from engine.config import EngineConfig
from engine.errors import first_line
from engine.kv_cache import KVCache
from engine.pipeline.bucket import DecodeShare
from engine.pipeline.capture import Captures
from engine.pipeline.lanes import Lanes
from engine.pipeline.padded_inputs import packed_step
from engine.pipeline.padded_layers import PaddedLayers, PaddedStep
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.schedule import Schedule, ScheduleError
from engine.pipeline.synthetic_step import synthetic_batch
from engine.pipeline.token_bucket import token_sizes
from engine.sampling_table import Int64s

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrialStep:
    """`fill` says what the next run computes; it takes the same time whatever the schedule, and is not timed.

    `rows` [T] of the hidden states are those of the batch's tokens.
    """

    fill: Callable[[], None]
    run: Callable[[], Tensor]
    rows: Tensor


class TrialSteps:
    """Of one batch, by any schedule."""

    def __init__(
        self,
        layers: PaddedLayers,
        batch: Batch,
        tokens_T: Tensor,
        sequential: PaddedStep,
        captures: Captures | None,
    ) -> None:
        self._layers = layers
        self._batch = batch
        self._sequential = sequential
        self._captures = captures
        self._tokens = tokens_T
        self._device = tokens_T.device

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
        rows_T, positions_T = (torch.from_numpy(array).to(device) for array in _rows_and_positions(batch))
        layers = PaddedLayers(config, pipeline, cache, pool)
        step = layers.sequential(sizes[index])
        if step.bucket.dealt(batch) is None:
            return None
        if captures is not None:
            try:
                step.capture(captures, layers.inputs)
            except RuntimeError as error:  # torch's own of captures are, and `CaptureError`: as where steps are served
                _log.warning("Steps are timed as they are launched: %s", first_line(error))
                return None
        return cls(layers, batch, pool.read_tokens(rows_T, positions_T), step, captures)

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
        except Exception as error:  # as `PaddedSteps.serve` takes it
            is_known = isinstance(error, ScheduleError | RuntimeError)
            _log.warning("A plan would not be run: %s", first_line(error), exc_info=not is_known)
            step = self._sequential
        return self._trial_step(step)

    @property
    def sequential(self) -> TrialStep:
        """What runs without a plan."""
        return self._trial_step(self._sequential)

    @property
    def tokens(self) -> Tensor:
        """Those of the batch [T]."""
        return self._tokens

    def _trial_step(self, step: PaddedStep) -> TrialStep:
        dealt = step.bucket.dealt(self._batch)
        assert dealt is not None
        packed, rows = packed_step(step.bucket, self._batch, dealt, *_rows_and_positions(self._batch))
        fill = partial(self._layers.inputs.fill, torch.from_numpy(packed).to(self._device))
        return TrialStep(fill=fill, run=step.run, rows=torch.from_numpy(rows).to(self._device))


def _rows_and_positions(batch: Batch) -> tuple[Int64s, Int64s]:
    ranges = zip(batch.starts.tolist(), batch.counts.tolist(), strict=True)
    positions = np.concatenate([np.arange(start, start + count) for start, count in ranges])
    return np.repeat(batch.rows, batch.counts).astype(np.int64), positions
