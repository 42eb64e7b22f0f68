"""Paged attention and KV writes in plain torch, for any device and floating type; docs/cpu_attention.md measures them.

Legend: T tokens of the step; D decode sequences; P prefill sequences with Q tokens together; N cache blocks of S slots
each; B width of a block table; L context tokens; H query heads; K key/value heads; G = H / K query heads per KV head;
d head dimension. The cache is "HND": keys, values [N, K, S, d]. Query heads of a group share their KV head without
expanding it. A window w lets the token at position p see positions p-w+1 .. p, as transformers defines it.

Half-precision blocks are attended in float32 on a CPU: no slower than bfloat16 there, and 2 to 5 times faster than
float16.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

# Keys gathered at once. A CPU gathers what stays in its cache while it is used; fresh memory for all sequences of a
# large batch costs more in page faults than attention itself. A GPU wants few launches and bounded scratch memory.
_CPU_GROUP_BYTES = 2**20
_CUDA_GROUP_BYTES = 2**28
# Queries of a prefill attended at once: later keys than the last of them are not touched.
_QUERY_TILE = 128
# Far beyond any activation, and such that no product of two overflows float32.
LARGEST_CACHED = 2.0**50


def write_kv(
    key_TKd: Tensor,
    value_TKd: Tensor,
    slots_T: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Store each token's key and value, over its scale, at its slot, block id * S + offset, in place.

    The cache stays finite whatever a model computes: a masked position is multiplied by zero, and zero times infinity
    would carry one request's overflow to the next owner of its blocks.
    """
    num_kv_heads, block_size, head_dim = keys.shape[1:]
    heads_K = torch.arange(num_kv_heads, device=slots_T.device)
    tiles_TK = (slots_T // block_size)[:, None] * num_kv_heads + heads_K
    rows = (tiles_TK * block_size + (slots_T % block_size)[:, None]).flatten()
    largest = min(LARGEST_CACHED, torch.finfo(keys.dtype).max)
    for cache, new_TKd, scale in ((keys, key_TKd, key_scale), (values, value_TKd, value_scale)):
        if scale != 1.0:
            new_TKd = new_TKd.float() / scale
        finite_TKd = new_TKd.nan_to_num(0.0).clamp_(-largest, largest)
        stored_TKd = finite_TKd.to(cache.dtype)
        if cache.element_size() == 1:
            cache, stored_TKd = cache.view(torch.uint8), stored_TKd.view(torch.uint8)
        cache.view(-1, head_dim).index_copy_(0, rows, stored_TKd.view(-1, head_dim))


def decode_attention(
    query_DHd: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables_DB: Tensor,
    lengths_D: Tensor,
    max_length: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attention of one new token per sequence over its `lengths_D` cached tokens, itself included: [D, H, d].

    `max_length` is the largest of the lengths, so that a GPU need not be asked for it.
    """
    num_kv_heads, block_size = keys.shape[1:3]
    max_blocks = -(-max_length // block_size)
    if window is not None and window < max_length:
        max_blocks = min(max_blocks, (window + block_size - 2) // block_size + 1)
        block_tables_DB, lengths_D = _clip_to_window(block_tables_DB, lengths_D, max_blocks, block_size, window)
    query_DKGd = _grouped(query_DHd, num_kv_heads).to(_compute_dtype(keys))
    output_DHd = torch.empty_like(query_DHd)
    bytes_per_block = keys[0].numel() * query_DKGd.element_size() if len(keys) else 1
    for rows, width in _groups(lengths_D, block_size, max_blocks, bytes_per_block):
        tables, lengths = block_tables_DB[rows, :width], lengths_D[rows, None]
        positions_L = torch.arange(width * block_size, device=lengths.device)
        visible_DL = positions_L < lengths
        if window is not None:
            visible_DL &= positions_L >= lengths - window
        attended_DKGd = functional.scaled_dot_product_attention(
            query_DKGd[rows],
            _gather(keys, tables),
            _gather(values, tables),
            attn_mask=visible_DL[:, None, None],
            scale=scale,
        )
        output_DHd[rows] = attended_DKGd.flatten(1, 2).to(query_DHd.dtype)
    return output_DHd


def prefill_attention(
    query_QHd: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables_PB: Tensor,
    chunk_sizes: tuple[int, ...],
    context_lengths: tuple[int, ...],
    scale: float,
    window: int | None,
) -> Tensor:
    """Causal attention of prompt chunks over everything cached before them and themselves: [Q, H, d].

    Chunk i is the last `chunk_sizes[i]` of its sequence's `context_lengths[i]` cached tokens.
    """
    num_kv_heads, block_size = keys.shape[1:3]
    query_KGQd = _grouped(query_QHd, num_kv_heads).permute(1, 2, 0, 3).to(_compute_dtype(keys))
    output_QHd = torch.empty_like(query_QHd)
    first = 0
    for index, (size, length) in enumerate(zip(chunk_sizes, context_lengths, strict=True)):
        start = length - size
        first_block = 0 if window is None else max(0, start - window + 1) // block_size
        table = block_tables_PB[index : index + 1, first_block : -(-length // block_size)]
        attended_KGQd = _attend_chunk(
            query_KGQd[:, :, first : first + size],
            _gather(keys, table)[0],
            _gather(values, table)[0],
            start - first_block * block_size,
            scale,
            window,
        )
        output_QHd[first : first + size] = attended_KGQd.permute(2, 0, 1, 3).flatten(1, 2).to(query_QHd.dtype)
        first += size
    return output_QHd


def _attend_chunk(
    query_KGQd: Tensor, keys_KLd: Tensor, values_KLd: Tensor, start: int, scale: float, window: int | None
) -> Tensor:
    """One chunk whose first query is at position `start` of the gathered context: [K, G, Q, d], a tile at a time."""
    group_size, size = query_KGQd.shape[1:3]
    positions_L = torch.arange(keys_KLd.shape[1], device=query_KGQd.device)
    outputs = []
    for first in range(0, size, _QUERY_TILE):
        last = min(first + _QUERY_TILE, size)
        seen = slice(0 if window is None else max(0, start + first - window + 1), start + last)
        visible_QL = positions_L[seen] <= positions_L[start + first : start + last, None]
        if window is not None:
            visible_QL &= positions_L[seen] > positions_L[start + first : start + last, None] - window
        output_KGQd = functional.scaled_dot_product_attention(
            query_KGQd[:, :, first:last],
            keys_KLd[:, None, seen].expand(-1, group_size, -1, -1),
            values_KLd[:, None, seen].expand(-1, group_size, -1, -1),
            attn_mask=visible_QL,
            scale=scale,
        )
        outputs.append(output_KGQd)
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def _grouped(query_THd: Tensor, num_kv_heads: int) -> Tensor:
    """[T, H, d] -> [T, K, G, d]."""
    num_tokens, num_heads, head_dim = query_THd.shape
    return query_THd.view(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)


def _compute_dtype(cache: Tensor) -> torch.dtype:
    """The type to attend in; see the module's docstring."""
    if cache.element_size() == 1:  # FP8: it holds, and computes nothing
        return torch.float32
    return torch.float32 if cache.element_size() == 2 and not cache.is_cuda else cache.dtype


def _gather(cache: Tensor, block_tables_DB: Tensor) -> Tensor:
    """The blocks of each sequence side by side, in the type to attend in: [D, K, B * S, d]."""
    num_kv_heads, block_size, head_dim = cache.shape[1:]
    heads_K1 = torch.arange(num_kv_heads, device=cache.device)[:, None]
    tiles_DKB = block_tables_DB[:, None, :] * num_kv_heads + heads_K1
    # FP8 is copied as bytes, here and above: torch has indexed copies of it on some devices and not on others.
    stored = cache.view(torch.uint8) if cache.element_size() == 1 else cache
    tiles = stored.view(-1, block_size * head_dim).index_select(0, tiles_DKB.flatten()).view(cache.dtype)
    return tiles.view(len(tiles_DKB), num_kv_heads, -1, head_dim).to(_compute_dtype(cache))


def _groups(
    lengths_D: Tensor, block_size: int, max_blocks: int, bytes_per_block: int
) -> Iterator[tuple[Tensor | slice, int]]:
    """Sequences to attend together and the blocks that the longest of them has.

    On a CPU neighbours in order of length, so that short ones hardly pay for long ones; a GPU is not asked for lengths.
    """
    num_sequences = len(lengths_D)
    if lengths_D.is_cuda:
        size = max(1, _CUDA_GROUP_BYTES // (max_blocks * bytes_per_block))
        yield from ((slice(first, first + size), max_blocks) for first in range(0, num_sequences, size))
        return
    ordered, order = lengths_D.sort(descending=True)
    lengths = ordered.tolist()
    first = 0
    while first < num_sequences:
        width = -(-lengths[first] // block_size)
        size = max(1, _CPU_GROUP_BYTES // (width * bytes_per_block))
        yield order[first : first + size], width
        first += size


def _clip_to_window(
    block_tables_DB: Tensor, lengths_D: Tensor, max_blocks: int, block_size: int, window: int
) -> tuple[Tensor, Tensor]:
    """Tables [D, max_blocks] that begin with the block of each window's first token, and lengths counted from there."""
    first_blocks_D = (lengths_D - window).clamp(min=0) // block_size
    columns = first_blocks_D[:, None] + torch.arange(max_blocks, device=lengths_D.device)
    columns.clamp_(max=block_tables_DB.shape[1] - 1)
    return block_tables_DB.gather(1, columns), lengths_D - first_blocks_D * block_size
