"""A step of any shape for measuring: `StepInputs`, or a `Batch`, over a cache of random keys and values of its own.

Decodes have ragged contexts, as in service; prefill tokens come as fresh prompts or, for longer contexts, as later
chunks of prompts. Sequences share blocks when the cache is smaller than what they hold together.
"""

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.batch_shape import BatchShape
from engine.config import DeviceKind, EngineConfig
from engine.kv_cache import KVCache
from engine.step_inputs import StepInputs
from engine.token_pool import TokenPool

# More than processors keep near them, so that attention reads memory; less than what a rank can spare.
_MAX_CACHE_BYTES = {DeviceKind.CPU: 2**28, DeviceKind.CUDA: 2**31}
_DRAWN_BLOCKS = 1024


def synthetic_cache(config: EngineConfig, num_tokens: int, device: torch.device) -> KVCache:
    """Random keys and values for `num_tokens` tokens, as far as there is room; all layers share one layer's tensors."""
    num_kv_heads = config.model.kv_heads_per_rank(config.tensor_parallel)
    bytes_per_block = 2 * num_kv_heads * config.block_size * config.model.head_dim * config.cache_format.num_bytes
    cache = KVCache(
        num_layers=1,
        num_blocks=max(1, min(-(-num_tokens // config.block_size), _MAX_CACHE_BYTES[config.device] // bytes_per_block)),
        num_kv_heads=num_kv_heads,
        block_size=config.block_size,
        head_dim=config.model.head_dim,
        dtype=getattr(torch, config.cache_format.torch_name),
        device=device,
    )
    for tensor in (cache.keys[0], cache.values[0]):
        _fill(tensor)
    cache.keys, cache.values = cache.keys * config.model.num_layers, cache.values * config.model.num_layers
    return cache


def _fill(tensor: Tensor) -> None:
    """With normal numbers; those in FP8 cannot be drawn and come from wider ones, some blocks at a time."""
    if tensor.element_size() > 1:
        tensor.normal_()
        return
    for part in torch.split(tensor, _DRAWN_BLOCKS):
        part.copy_(torch.randn(part.shape, dtype=torch.bfloat16, device=part.device))


def synthetic_step(shape: BatchShape, max_model_len: int, cache: KVCache, device: torch.device) -> StepInputs:
    """A step of `shape`, whose numbers of tokens are whole; its mean contexts are met within half a token."""
    decodes = _decode_lengths(int(shape.num_decodes), shape.decode_context, max_model_len)
    chunks = _chunks(int(shape.num_prefills), shape.prefill_context, max_model_len)
    sizes = [1] * len(decodes) + [size for size, _ in chunks]
    lengths = decodes + [length for _, length in chunks]
    tables = _block_tables(lengths, cache)
    rows = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64))
    ranges = zip(sizes, lengths, strict=True)
    positions = torch.cat([torch.arange(length - size, length) for size, length in ranges])
    slots = tables[rows, positions // cache.block_size] * cache.block_size + positions % cache.block_size
    starts, ends = None, None
    if device.type == "cuda":  # where kernels read them
        starts = torch.tensor([0, *(size for size, _ in chunks)], dtype=torch.int64).cumsum(0).to(device)
        ends = torch.tensor([length for _, length in chunks], dtype=torch.int64, device=device)
    return StepInputs(
        tokens=torch.zeros_like(positions).to(device),
        positions=positions.to(device),
        slots=slots.to(device),
        decode_block_tables=tables[: len(decodes)].to(device),
        decode_lengths=torch.tensor(decodes, dtype=torch.int64, device=device),
        prefill_block_tables=tables[len(decodes) :].to(device),
        num_decodes=len(decodes),
        max_decode_length=max(decodes, default=0),
        prefill_chunk_sizes=tuple(size for size, _ in chunks),
        prefill_context_lengths=tuple(length for _, length in chunks),
        kv_cache=cache,
        prefill_starts=starts,
        prefill_lengths=ends,
    )


def synthetic_batch(
    shape: BatchShape, config: EngineConfig, cache: KVCache, device: torch.device
) -> tuple[Batch, TokenPool]:
    """The same step as a batch that draws nothing, and the pool that its rows are in, of random tokens.

    The tokens are the same on every rank, and all sorts, because equal ones would all be routed to the same experts.
    """
    lengths, chunks = _decode_lengths(int(shape.num_decodes), shape.decode_context, config.max_model_len), []
    if shape.num_prefills:
        chunks = _chunks(int(shape.num_prefills), shape.prefill_context, config.max_model_len)
    counts = np.array([1] * len(lengths) + [size for size, _ in chunks], dtype=np.int32)
    contexts = lengths + [length for _, length in chunks]
    pool = TokenPool(
        max_sequences=len(contexts),
        max_model_len=config.max_model_len,
        max_blocks_per_sequence=config.max_blocks_per_sequence,
        device=device,
    )
    tables = _block_tables(contexts, cache)
    pool.block_tables[:, : tables.shape[1]] = tables.to(device)
    generator = torch.Generator().manual_seed(0)
    pool.tokens.copy_(torch.randint(config.model.vocab_size, pool.tokens.shape, generator=generator))
    batch = Batch(
        step=0,
        admissions=(),
        block_updates=np.zeros((0, 3), np.int32),
        rows=np.arange(len(counts), dtype=np.int32),
        starts=np.array(contexts, np.int32) - counts,
        counts=counts,
        num_decodes=len(lengths),
        sampled=np.zeros(0, np.int32),
    )
    return batch, pool


def _decode_lengths(num_decodes: int, context: float, max_model_len: int) -> list[int]:
    """Evenly spread from half the context to one and a half, as far as a sequence may be long."""
    spread = max(0.0, min(context / 2, max_model_len - context, context - 1))
    steps = [2 * index / (num_decodes - 1) - 1 if num_decodes > 1 else 0.0 for index in range(num_decodes)]
    return [round(context + spread * step) for step in steps]


def _chunks(num_tokens: int, context: float, max_model_len: int) -> list[tuple[int, int]]:
    """(size, length up to and including the chunk), each as large as has the mean context wanted."""
    largest = max(1, min(round(2 * context) - 1, 2 * int(max_model_len - context) + 1))
    chunks: list[tuple[int, int]] = []
    while num_tokens > 0:
        size = min(largest, num_tokens)
        chunks.append((size, size + max(0, round(context - (size + 1) / 2))))
        num_tokens -= size
    return chunks


def _block_tables(lengths: list[int], cache: KVCache) -> Tensor:
    """[S, B]: blocks in random order, each sequence the next ones, round and round."""
    counts = [-(-length // cache.block_size) for length in lengths]
    order = torch.randperm(cache.num_blocks, generator=torch.Generator().manual_seed(0))
    tables = torch.zeros(len(lengths), max(counts, default=0), dtype=torch.int64)
    first = 0
    for row, count in enumerate(counts):
        tables[row, :count] = order[torch.arange(first, first + count) % cache.num_blocks]
        first += count
    return tables


def drawn_rows(step: StepInputs) -> Tensor:
    """Those that a served step draws from: every decode, and the last of each chunk, as if it ended its prompt."""
    sizes_C = torch.tensor([1] * step.num_decodes + list(step.prefill_chunk_sizes), dtype=torch.int64)
    return sizes_C.cumsum(0) - 1
