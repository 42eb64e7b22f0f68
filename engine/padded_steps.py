"""`PaddedSteps`: the layers of one rank's model run on steps of a few fixed sizes, as a CUDA graph each where there is
CUDA.

One graph serves every mix of decodes and chunks that its bucket holds: what differs is read on the device. It begins
with the gathering of inputs and ends with the hidden states; the head and the draws are launched behind it, as how many
rows are drawn differs. All operations must be computed by kernels that read lengths on the device
(`engine.gpu_model`), and the model runs sequentially, as it is written.
"""

from functools import partial

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.kv_cache import KVCache
from engine.models.decoder import Decoder
from engine.padded_inputs import PaddedInputs
from engine.pipeline.capture import CapturedRun, Captures
from engine.token_bucket import TokenBucket, token_buckets
from engine.token_pool import TokenPool


class PaddedSteps:
    """`inputs` are filled before each run, on the stream that it runs on."""

    def __init__(self, config: EngineConfig, model: Decoder, kv_cache: KVCache, pool: TokenPool) -> None:
        self._model = model
        self._width = config.model.num_heads // config.tensor_parallel * config.model.head_dim
        self.buckets = token_buckets(config.max_batch_tokens, config.max_sequences)
        self.inputs = PaddedInputs(self.buckets, pool, kv_cache)
        self._captured: dict[TokenBucket, CapturedRun[Tensor]] = {}

    @torch.inference_mode()
    def capture(self, captures: Captures) -> None:
        """Make every bucket a graph, the largest first: the others fit into its memory. The cache stays as it is.

        Raises `CaptureError` where the model waits for the device.
        """
        for bucket in reversed(self.buckets):
            self.inputs.clear(bucket)
            self._captured[bucket] = captures.capture(partial(self._run, bucket))

    def run(self, bucket: TokenBucket) -> Tensor:
        """Hidden states [T, E] behind the last layer, of all rows; they last until the next run."""
        captured = self._captured.get(bucket)
        return self._run(bucket) if captured is None else captured.replay()

    def _run(self, bucket: TokenBucket) -> Tensor:
        weight = self._model.embed_tokens.shard.weight
        attention_TA = torch.empty(bucket.num_tokens, self._width, dtype=weight.dtype, device=weight.device)
        step = self.inputs.step(bucket, attention_TA)
        hidden_TE: Tensor = self._model.embed_tokens(step)
        for layer in self._model.layers:
            hidden_TE = layer(hidden_TE, step)
        return hidden_TE
