"""`PaddedSteps`: the layers of one rank's model run on steps of a few fixed sizes, as a CUDA graph each where there is
CUDA.

One graph serves every mix of decodes and chunks that its bucket holds: what differs is read on the device. It begins
with the gathering of inputs and ends with the hidden states; the head and the draws are launched behind it, as how many
rows are drawn differs. All operations must be computed by kernels that read lengths on the device
(`engine.gpu_model`), and they run one after the other.
"""

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from engine.batch import Batch
from engine.config import EngineConfig
from engine.kv_cache import KVCache
from engine.layers.mixture_of_experts import GroupedExperts
from engine.models.decoder import Decoder
from engine.padded_inputs import PaddedInputs
from engine.pipeline.capture import CapturedRun, Captures
from engine.pipeline.fused_run import FusedRun
from engine.pipeline.pipeline import Pipeline
from engine.step_inputs import StepInputs
from engine.token_bucket import TokenBucket, token_buckets
from engine.token_pool import TokenPool


class PaddedSteps:
    """`inputs` are filled before each run, on the stream that it runs on."""

    def __init__(
        self, config: EngineConfig, model: Decoder, pipeline: Pipeline, kv_cache: KVCache, pool: TokenPool
    ) -> None:
        self._embedding = model.embed_tokens
        self._layers = FusedRun(pipeline.programs)
        self._experts = [module for module in model.modules() if isinstance(module, GroupedExperts)]
        self._width = config.model.num_heads // config.tensor_parallel * config.model.head_dim
        self.buckets = token_buckets(config.max_batch_tokens, config.max_sequences)
        self.inputs = PaddedInputs(self.buckets, pool, kv_cache)
        weight = self._embedding.shard.weight
        self._hidden_TE = weight.new_empty(self.buckets[-1].num_tokens, weight.shape[1])
        self._captured: dict[TokenBucket, CapturedRun[Tensor]] = {}

    @torch.inference_mode()
    def capture(self, captures: Captures) -> None:
        """Make every bucket a graph, the largest first: the others fit into its memory. The cache stays as it is.

        Raises `CaptureError` where the model waits for the device.
        """
        for bucket in reversed(self.buckets):
            self.inputs.clear(bucket)
            self._captured[bucket] = captures.capture(partial(self._run, bucket))

    def bucket_of(self, batch: Batch) -> TokenBucket | None:
        """The smallest that a batch can be padded to, if there is one."""
        index = bisect_left(self.buckets, batch.num_tokens, key=lambda bucket: bucket.num_tokens)
        # What this has no room for, though it has rows enough, are too many chunks for any.
        found = self.buckets[index] if index < len(self.buckets) else None
        return found if found is not None and found.holds(batch) else None

    def gather(self, num_tokens: int) -> StepInputs:
        """What a step of a bucket with room for so many tokens begins with, to be timed."""
        bucket = next(bucket for bucket in self.buckets if bucket.num_tokens >= num_tokens)
        return self.inputs.step(bucket, self._hidden_TE)

    def run(self, bucket: TokenBucket) -> Tensor:
        """Hidden states [T, E] behind the last layer, of all rows; they last until the next run."""
        captured = self._captured.get(bucket)
        return self._run(bucket) if captured is None else captured.replay()

    def _run(self, bucket: TokenBucket) -> Tensor:
        step = self.inputs.step(bucket, self._hidden_TE.new_empty(bucket.num_tokens, self._width))
        assert step.prefill_starts is not None
        with self._experts_of(step.prefill_starts[-1:]):
            # In one place for all graphs: none has to keep its own.
            return self._hidden_TE[: bucket.num_tokens].copy_(self._layers(self._embedding(step), step))

    @contextmanager
    def _experts_of(self, num_tokens: Tensor) -> Iterator[None]:
        """Inside, no row from this one on goes to any expert: the last chunk's end, behind which rows are padding."""
        for experts in self._experts:
            experts.num_tokens = num_tokens
        try:
            yield
        finally:
            for experts in self._experts:
                experts.num_tokens = None
