"""`PaddedLayers`: all layers of one rank's model on steps of fixed sizes, from the gathering of inputs to the hidden
states behind the last layer, so that each can be one CUDA graph.

All operations must be computed by kernels that read lengths on the device (`engine.gpu_model`). The head and the draws
are launched behind a step, as how many rows are drawn differs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.kv_cache import KVCache
from engine.pipeline.capture import Captures
from engine.pipeline.fused_run import FusedRun
from engine.pipeline.lanes import Lanes
from engine.pipeline.padded_inputs import PaddedInputs, num_integers
from engine.pipeline.padded_schedule import MOST_NANO_BATCHES, padded_schedule
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.schedule import Schedule
from engine.pipeline.token_bucket import TokenBucket, most_chunks, token_sizes, whole_bucket
from engine.step_inputs import StepInputs
from engine.token_pool import TokenPool


@dataclass(slots=True, kw_only=True)
class PaddedStep:
    """Steps of one bucket: `run` gives the hidden states [T, E] of all its rows, which last until the next run."""

    bucket: TokenBucket
    run: Callable[[], Tensor]

    @torch.inference_mode()
    def capture(self, captures: Captures, inputs: PaddedInputs) -> None:
        """Make it a graph. The cache stays as it is. Raises `CaptureError` where it waits for the device."""
        inputs.clear(self.bucket)
        self.run = captures.capture(self.run).replay


class PaddedLayers:
    """Makes padded steps; `inputs` are filled before each run of any, on the stream that it runs on."""

    def __init__(self, config: EngineConfig, pipeline: Pipeline, kv_cache: KVCache, pool: TokenPool) -> None:
        self._config = config
        self._pipeline = pipeline
        self._embedding = pipeline.embedding
        self._layers = FusedRun(pipeline.programs)
        self._width = config.model.num_heads // config.tensor_parallel * config.model.head_dim
        largest = token_sizes(config.max_batch_tokens)[-1]
        num_chunks = most_chunks(largest, config.max_sequences)
        self.inputs = PaddedInputs(num_integers(largest, MOST_NANO_BATCHES, num_chunks), pool, kv_cache)
        weight = self._embedding.shard.weight
        self._hidden_TE = weight.new_empty(largest, weight.shape[1])

    def sequential(self, num_tokens: int) -> PaddedStep:
        """Steps of so many rows, of every mix, one operation after the other."""
        bucket = whole_bucket(num_tokens, self._config.max_sequences)
        return PaddedStep(bucket=bucket, run=partial(self._run_whole, bucket))

    def planned(self, schedule: Schedule, num_tokens: int, most_decodes: int, lanes: Lanes) -> PaddedStep:
        """Steps of so many rows by a schedule, of at most so many decodes as far as its nano-batches hold them.

        Raises `ScheduleError` where it cannot be run so.
        """
        padded = padded_schedule(schedule, self._pipeline.graph, num_tokens, most_decodes, self._config.max_sequences)
        self._pipeline.check(padded.schedule)
        return PaddedStep(bucket=padded.bucket, run=partial(self._run_cut, padded.bucket, padded.schedule, lanes))

    def gather(self, bucket: TokenBucket) -> StepInputs:
        """What a step of a bucket in one piece begins with, to be timed."""
        return self.inputs.step(bucket, self._hidden_TE)

    def _run_whole(self, bucket: TokenBucket) -> Tensor:
        """Additions are computed with the norms of their sums."""
        step = self.inputs.step(bucket, self._hidden_TE.new_empty(bucket.num_tokens, self._width))
        # In one place for all graphs: none has to keep its own.
        return self._hidden_TE[: bucket.num_tokens].copy_(self._layers(self._embedding(step), step))

    def _run_cut(self, bucket: TokenBucket, schedule: Schedule, lanes: Lanes) -> Tensor:
        return self._pipeline.run_padded(self.inputs.parts(bucket), schedule, lanes)
