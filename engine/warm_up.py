"""The warm-up of a rank: steps of the largest shapes before the cache is sized, on row tables of their own.

Libraries, threads, collectives and allocators initialise themselves on first use, which no request shall wait for.
On a GPU the largest step also makes torch's allocator reserve what activations need, so that the free memory read
afterwards really is free for the cache. On a CPU a tiny step does: there the first request must not wait for it.
"""

import numpy as np
import torch

from engine.batch import Admission, Batch, IntArray
from engine.config import EngineConfig
from engine.kv_cache import KVCache
from engine.model_runner import ModelRunner
from engine.models.decoder import Decoder
from engine.pipeline.pipeline import Pipeline
from engine.request import SamplingParams

_CPU_TOKENS = 8


def warm_up(
    config: EngineConfig, model: Decoder, pipeline: Pipeline, device: torch.device, *, uses_gpu_kernels: bool = False
) -> None:
    """Run a prefill of the dense batch and a decode of every row, then forget both."""
    num_tokens = config.max_batch_tokens if device.type == "cuda" else min(_CPU_TOKENS, config.max_batch_tokens)
    counts = _chunk_sizes(num_tokens, config.max_model_len, config.max_sequences)
    num_decodes = config.max_sequences if device.type == "cuda" else 1
    steps = (
        (np.zeros(len(counts), np.int32), counts, 0),
        (np.zeros(num_decodes, np.int32), np.ones(num_decodes, np.int32), num_decodes),
    )
    num_blocks = max(num_decodes, int(sum(-(-counts // config.block_size))))
    cache = KVCache.allocate(config, num_blocks, device)
    runner = ModelRunner(config, model, pipeline, cache, device, uses_gpu_kernels=uses_gpu_kernels)
    for number, (starts, sizes, decodes) in enumerate(steps):
        runner.launch(_batch(number, starts, sizes, decodes, config.block_size)).wait()


def _chunk_sizes(num_tokens: int, max_model_len: int, max_sequences: int) -> IntArray:
    """`num_tokens` tokens as whole prompts of at most `max_model_len`, as far as there are rows."""
    num_tokens = min(num_tokens, max_model_len * max_sequences)
    num_chunks = -(-num_tokens // max_model_len)
    counts = np.full(num_chunks, max_model_len, np.int32)
    counts[-1] = num_tokens - max_model_len * (num_chunks - 1)
    return counts


def _batch(number: int, starts: IntArray, counts: IntArray, num_decodes: int, block_size: int) -> Batch:
    """Rows 0, 1, ... of token 0, with random sampling, each with blocks of its own."""
    rows = np.arange(len(counts), dtype=np.int32)
    num_blocks = -(-counts // block_size)
    updates = np.empty((int(num_blocks.sum()), 3), np.int32)
    updates[:, 0] = np.repeat(rows, num_blocks)
    updates[:, 2] = np.arange(len(updates))
    updates[:, 1] = updates[:, 2] - np.repeat(num_blocks.cumsum() - num_blocks, num_blocks)
    admissions = tuple(
        Admission(row=row, token_ids=np.zeros(count, np.int32), num_prompt_tokens=count, sampling=SamplingParams())
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True)
    )
    return Batch(
        step=number,
        admissions=admissions,
        block_updates=updates,
        rows=rows,
        starts=starts,
        counts=counts,
        num_decodes=num_decodes,
        sampled=rows,
    )
