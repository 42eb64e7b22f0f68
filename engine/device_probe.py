"""`DeviceProbe`: measures on a GPU, before it serves, what `DeviceTimes` shares out the time of steps by.

Each kind of operation is run by itself as a graph, over all layers, as padded steps run it: products, collectives and
the rest for a few numbers of rows; attention of decodes and of prompts for a few numbers of tokens and of contexts; the
head and drawing for a few numbers of drawn rows. It takes a few seconds. What is measured are the kernels with the gaps
that a graph leaves between them, of activations that are random and keys and values that mostly are zeros: attention of
prompts, which is bound by computing, may be some percent slower in service.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.batch_shape import BatchShape
from engine.config import EngineConfig
from engine.device_times import DeviceTimes, StepPart
from engine.kv_cache import KVCache
from engine.models.decoder import Decoder
from engine.pipeline.cost_law import LawSample, fit_law
from engine.pipeline.fused_run import FusedRun
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.stopwatch import Cost
from engine.pipeline.synthetic_step import synthetic_step
from engine.request import SamplingParams
from engine.sampling_table import SamplingTable
from engine.staging import stage
from engine.step_inputs import StepInputs
from engine.step_work import mean_seen

# Rows and drawn rows: time hardly grows before the first of them, and nearly in straight lines between the others.
_SIZES = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096)
_DECODES = (1, 32, 256)
_CHUNKS = (16, 128, 512, 2048)
# Beyond the largest attention grows in proportion; measuring would take long.
_CONTEXTS, _LARGEST_CONTEXT = (128, 2048), 8192

Samples = dict[StepPart, list[LawSample]]


class RunTimer(Protocol):
    """As `engine.pipeline.timer.GraphTimer`."""

    def seconds(self, run: Callable[[], object]) -> float:
        """What a run takes on the device."""
        ...


class DeviceProbe:
    """Of one rank, whose cache nobody uses yet: it is written to, and zeros again at the end."""

    def __init__(
        self,
        config: EngineConfig,
        model: Decoder,
        pipeline: Pipeline,
        cache: KVCache,
        timer: RunTimer,
        *,
        most_rows: int,
        gather: Callable[[int], object],
    ) -> None:
        """`most_rows` are those of the largest padded step, `gather` gathers the inputs of one with so many rows."""
        self._config = config
        self._model = model
        self._pipeline = pipeline
        self._cache = cache
        self._most_rows = most_rows
        self._gather = gather
        self._timer = timer
        self._device = cache.keys[0].device
        self._layers = FusedRun(pipeline.programs)
        self._windows = tuple(config.model.sliding_window(layer) for layer in range(config.model.num_layers))
        self._samples: Samples = {}

    @torch.inference_mode()
    def measure_alone(self) -> None:
        """Everything that no other rank takes part in. Raises `CaptureError` where something waits for the device, and
        what torch raises where there is no memory left.
        """
        with self._cache_left_empty():
            self._measure_rows()
            self._measure_attention()
            self._measure_draws()

    @torch.inference_mode()
    def measure_together(self) -> None:
        """The collectives: all ranks of the group call this at the same time."""
        if self._model.embed_tokens.all_reduce.is_identity:
            return
        with self._cache_left_empty():
            for size in _some(_SIZES, self._most_rows):
                step, hidden_TE = self._step(self._prompts(size))
                samples = self._layers.samples(hidden_TE, step)
                embedded_TE = torch.zeros_like(hidden_TE)
                self._add(StepPart.COLLECTIVES, size, lambda: self._exchange(samples, step, embedded_TE))  # noqa: B023
        head = self._model.lm_head
        for size in _some(_SIZES, self._config.max_sequences):
            shard_KR = head.shard(self._random(size))
            self._add(StepPart.HEAD_COLLECTIVE, size, lambda: head.join(shard_KR))  # noqa: B023

    def times(self) -> DeviceTimes:
        """What was measured."""
        attention = (StepPart.DECODE_ATTENTION, StepPart.PREFILL_ATTENTION)
        laws = {part: fit_law(samples, part in attention) for part, samples in self._samples.items()}
        return DeviceTimes(laws=laws, graph=self._pipeline.graph, windows=self._windows)

    @contextmanager
    def _cache_left_empty(self) -> Iterator[None]:
        """A masked position still multiplies by what its slot holds."""
        try:
            yield
        finally:
            for tensor in (*self._cache.keys, *self._cache.values):
                tensor.zero_()

    def _measure_rows(self) -> None:
        """Products, and what is neither product nor attention nor of the network, by the rows of a step."""
        for size in _some(_SIZES, self._most_rows):
            step, hidden_TE = self._step(self._prompts(size))
            samples = self._layers.samples(hidden_TE, step)
            self._add(StepPart.PRODUCTS, size, lambda: self._layers.run_only(Cost.GEMM, samples, step))  # noqa: B023
            self._add(StepPart.REST, size, lambda: self._rest(samples, step))  # noqa: B023

    def _rest(self, samples: dict[str, dict[str, Tensor]], step: StepInputs) -> None:
        """With the gathering of a padded step's inputs, and the embedding."""
        self._gather(len(step.tokens))
        self._model.embed_tokens.shard(step)
        self._layers.run_only(Cost.OTHER, samples, step)

    def _exchange(self, samples: dict[str, dict[str, Tensor]], step: StepInputs, embedded_TE: Tensor) -> None:
        self._model.embed_tokens.all_reduce(embedded_TE)
        self._layers.run_only(Cost.NETWORK, samples, step)

    def _measure_attention(self) -> None:
        """Of decodes by their number, and of prompts' chunks by their tokens, each by what is seen."""
        config, capacity = self._config, self._cache.num_blocks * self._cache.block_size
        for context in _some(_CONTEXTS, min(_LARGEST_CONTEXT, config.max_model_len)):
            for size in _some(_DECODES, config.max_sequences):
                if size == 1 or size * context <= capacity:  # else no such step comes
                    shape = BatchShape(num_decodes=size, num_prefills=0, decode_context=context)
                    self._attend(StepPart.DECODE_ATTENTION, shape)
            for size in _some(_CHUNKS, self._most_rows):
                # The mean of whole prompts as long as that, and of later chunks.
                shape = BatchShape(num_decodes=0, num_prefills=size, prefill_context=context / 2)
                self._attend(StepPart.PREFILL_ATTENTION, shape)

    def _attend(self, part: StepPart, shape: BatchShape) -> None:
        step, hidden_TE = self._step(shape)
        samples = self._layers.samples(hidden_TE, step)
        size = len(step.tokens)
        self._add(
            part,
            size,
            # Plans are made once for all layers, in every step anew.
            lambda: self._layers.run_only(Cost.ATTENTION, samples, replace(step, decode_plans={})),
            self._seen(step),
        )

    def _seen(self, step: StepInputs) -> float:
        if step.num_decodes:
            counts = np.ones(step.num_decodes, np.int32)
            lengths = step.decode_lengths.cpu().numpy().astype(np.int32)
        else:
            counts = np.array(step.prefill_chunk_sizes, np.int32)
            lengths = np.array(step.prefill_context_lengths, np.int32)
        return mean_seen(lengths - counts, counts, self._windows)

    def _measure_draws(self) -> None:
        """The head's product, and the last norm and drawing, by the rows drawn from."""
        head, norm = self._model.lm_head, self._model.norm
        for size in _some(_SIZES, self._config.max_sequences):
            hidden_KE = self._random(size)
            self._add(StepPart.HEAD_PRODUCT, size, lambda: head.shard(hidden_KE))  # noqa: B023
            logits_KV = self._random(size, head.vocab_size)
            draw = self._draw(size)
            self._add(StepPart.DRAWING, size, lambda: (norm(hidden_KE), draw(logits_KV)))  # noqa: B023

    def _draw(self, size: int) -> Callable[[Tensor], object]:
        """Draws so many rows by the default way of sampling."""
        table = SamplingTable(size, self._config.model.vocab_size)
        for row in range(size):
            table.admit(row, SamplingParams(), 1)
        rows = np.arange(size, dtype=np.int64)
        plan = table.plan(rows, np.ones_like(rows), with_logprobs=False)
        staged = stage(plan.arrays, self._device)
        draw = self._model.lm_head.draw
        assert draw is not None, "kernels compute the model"
        return lambda logits_KV: draw(logits_KV, plan, staged)

    def _prompts(self, size: int) -> BatchShape:
        """So many tokens of whole prompts, each as long as may be."""
        longest = min(size, self._config.max_model_len)
        return BatchShape(num_decodes=0, num_prefills=size, prefill_context=(longest + 1) / 2)

    def _step(self, shape: BatchShape) -> tuple[StepInputs, Tensor]:
        """Inputs over the rank's own cache, as kernels read them, and hidden states."""
        step = synthetic_step(shape, self._config.max_model_len, self._cache, self._device)
        return step, self._random(len(step.tokens))

    def _random(self, size: int, width: int | None = None) -> Tensor:
        dtype = self._model.embed_tokens.shard.weight.dtype
        return torch.randn(size, width or self._config.model.hidden_size, device=self._device).to(dtype)

    def _add(self, part: StepPart, size: int, run: Callable[[], object], context: float = 0.0) -> None:
        found = LawSample(size, context, self._timer.seconds(run))
        self._samples.setdefault(part, []).append(found)


def _some(sizes: Sequence[int], largest: int) -> Iterator[int]:
    """Those up to the largest, which is one of them."""
    yield from (size for size in sizes if size < largest)
    yield largest
