"""The warm-up of a rank: steps of the largest shapes before the cache is sized, on row tables of their own.

Libraries, threads, collectives and allocators initialise themselves on first use, which no request shall wait for; on a
GPU kernels are compiled and modules loaded for every way of sampling, too. There the largest step also tells what
activations take, which is not the cache's. On a CPU a tiny step does: there the first request must not wait for it.

A kernel of a GPU is compiled for number formats, for which filters are on and for sizes of the model; not for how many
rows are drawn (`tests/engine/kernels/gpu/test_specialisation.py`). Libraries choose by that, though, so every way of
sampling is met by one row, by few, by sixteen and by all.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from engine.batch import Admission, Batch, IntArray
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.models.decoder import Decoder
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.synthetic_step import synthetic_cache
from engine.request import SamplingParams

_CPU_TOKENS = 8
_DEFAULT = (SamplingParams(),)
# Numbers of drawn rows that libraries may tell apart, beside all.
_NUM_DRAWN = (1, 2, 16)
# Every kernel of sampling, and every operation of torch's where a row wants more than to be drawn.
WAYS_OF_SAMPLING = (
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(min_p=0.1),
    SamplingParams(top_k=2),
    SamplingParams(top_p=0.9),
    SamplingParams(top_k=2, top_p=0.9, min_p=0.1),
    SamplingParams(repetition_penalty=1.1),
    SamplingParams(presence_penalty=0.1, temperature=0),
    SamplingParams(frequency_penalty=0.1, min_p=0.1),
    SamplingParams(frequency_penalty=0.1, top_k=2),
    SamplingParams(frequency_penalty=0.1, top_p=0.9),
    SamplingParams(logit_bias=((0, 1.0),)),
    SamplingParams(min_tokens=2, stop_token_ids=frozenset((0,))),
    SamplingParams(temperature=0, logprobs=0),
    SamplingParams(top_p=0.9, logprobs=5),
)


def warm_up(
    config: EngineConfig, model: Decoder, pipeline: Pipeline, device: torch.device, *, uses_gpu_kernels: bool = False
) -> int:
    """Run the steps of `warm_up_batches`, then forget them.

    Returns the bytes of the device that the largest step takes beside weights and cache; 0 on a CPU, where that is
    the operating system's matter.
    """
    is_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if is_gpu else 0
    # One layer's memory for all: nobody reads what they write.
    cache = synthetic_cache(config, config.block_size * _num_blocks(config, is_gpu), device)
    cache_bytes = torch.cuda.memory_allocated(device) - before if is_gpu else 0
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    runner = ModelRunner(config, model, pipeline, cache, device, uses_gpu_kernels=uses_gpu_kernels)
    for batch in warm_up_batches(config, cache.num_blocks, is_gpu=is_gpu):
        runner.launch(batch).wait()
    return torch.cuda.max_memory_allocated(device) - before - cache_bytes if is_gpu else 0


def warm_up_batches(config: EngineConfig, num_blocks: int, *, is_gpu: bool) -> Iterator[Batch]:
    """A prefill of the dense batch and a decode of every row; on a GPU then decodes that sample in every way.

    Their blocks are the first `num_blocks`, round and round where those are too few.
    """
    counts = _chunk_sizes(config, is_gpu)
    yield _batch(config, num_blocks, 0, counts, 0, _DEFAULT)
    if not is_gpu:
        yield _batch(config, num_blocks, 1, np.ones(1, np.int32), 1, _DEFAULT)
        return
    sizes = sorted({config.max_sequences, *(size for size in _NUM_DRAWN if size < config.max_sequences)}, reverse=True)
    samplings = [WAYS_OF_SAMPLING, *((way,) for way in WAYS_OF_SAMPLING)]  # mixed first: all arrays at once
    steps = ((size, sampling) for sampling in samplings for size in sizes)
    for number, (size, sampling) in enumerate(steps, start=1):
        yield _batch(config, num_blocks, number, np.ones(size, np.int32), size, sampling)


def _num_blocks(config: EngineConfig, is_gpu: bool) -> int:
    """Of the largest step."""
    num_decodes = config.max_sequences if is_gpu else 1
    return max(num_decodes, int(sum(-(-_chunk_sizes(config, is_gpu) // config.block_size))))


def _chunk_sizes(config: EngineConfig, is_gpu: bool) -> IntArray:
    """The tokens of the first step as whole prompts of at most `max_model_len`, as far as there are rows."""
    num_tokens = config.max_batch_tokens if is_gpu else min(_CPU_TOKENS, config.max_batch_tokens)
    num_tokens = min(num_tokens, config.max_model_len * config.max_sequences)
    num_chunks = -(-num_tokens // config.max_model_len)
    counts = np.full(num_chunks, config.max_model_len, np.int32)
    counts[-1] = num_tokens - config.max_model_len * (num_chunks - 1)
    return counts


def _batch(
    config: EngineConfig,
    num_blocks: int,
    number: int,
    counts: IntArray,
    num_decodes: int,
    sampling: Sequence[SamplingParams],
) -> Batch:
    """Rows 0, 1, ... of token 0, sampled by each in turn, each with blocks of its own as far as there are any."""
    rows = np.arange(len(counts), dtype=np.int32)
    num_row_blocks = -(-counts // config.block_size)
    updates = np.empty((int(num_row_blocks.sum()), 3), np.int32)
    numbers = np.arange(len(updates))
    updates[:, 0] = np.repeat(rows, num_row_blocks)
    updates[:, 1] = numbers - np.repeat(num_row_blocks.cumsum() - num_row_blocks, num_row_blocks)
    updates[:, 2] = numbers % num_blocks
    admissions = tuple(
        Admission(
            row=row,
            token_ids=np.zeros(count, np.int32),
            num_prompt_tokens=count,
            sampling=sampling[row % len(sampling)],
        )
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True)
    )
    return Batch(
        step=number,
        admissions=admissions,
        block_updates=updates,
        rows=rows,
        starts=np.zeros(len(counts), np.int32),
        counts=counts,
        num_decodes=num_decodes,
        sampled=rows,
    )
