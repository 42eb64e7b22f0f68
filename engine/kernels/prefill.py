"""Prefill attention on a CPU, by matrix products: `reference.prefill_attention`, in bfloat16 2 to 3 times as fast.

Chunks of similar size and context are attended together, tile after tile of queries, each against the keys that it can
see. Scores are products in float32; those of bfloat16 blocks let oneDNN take the factors as bfloat16, which they are,
and so lose nothing. Their weights, at most one, are rounded to bfloat16 before they meet the values, as FlashAttention
does (Dao et al. 2022). What depends on the shape of the step alone is in a `PrefillPlan`, made once for all layers.

Legend: as in `reference`; further C chunks of a group, Q queries of each (padded), n queries of a tile.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Queries of a chunk that are attended at once. Fewer skip more of the keys after them, more keep the products large: a
# chunk whose context is at least _LONG takes the larger tile.
_TILE, _LARGE_TILE = 64, 128
_LONG = 1024
# Of one temporary array: more would leave the processor's caches before it is used. A long context is cut by heads.
_LARGEST_BYTES = 2**22
# What chunks may be padded to be attended together: a share of their work, and scores for which a call is worse.
_LARGEST_PADDED = 1.25
_FREE_PADDING = 2**12


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Some queries of each chunk of a group, the keys that any of them sees, and what of these some do not see.

    `hidden` [C or 1, 1, 1, n, last keys] is 0 or minus infinity; the keys before those are seen by all.
    """

    queries: slice
    keys: slice
    hidden: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Chunks that are attended together.

    `rows` are their queries among those of the step, chunk after chunk; a short chunk repeats its last.
    `blocks` [C * K * B]: the tiles of the cache, block id * K + head, of each chunk's context.
    """

    num_chunks: int
    rows: slice | Tensor
    blocks: Tensor
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """`first_row` among the step's queries; `start` counts from the first token of the first block that is read."""

    index: int
    size: int
    start: int
    first_row: int
    first_block: int

    @property
    def length(self) -> int:
        return self.start + self.size


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Which chunks are attended together, and what each of their queries sees."""

    groups: tuple[Group, ...]

    @classmethod
    def of(
        cls,
        block_tables_PB: Tensor,
        chunk_sizes: Sequence[int],
        context_lengths: Sequence[int],
        *,
        num_kv_heads: int,
        num_heads: int,
        head_dim: int,
        block_size: int,
        window: int | None,
    ) -> "PrefillPlan":
        """Chunk i is the last `chunk_sizes[i]` of its sequence's `context_lengths[i]` cached tokens."""
        chunks = []
        first_row = 0
        for index, (size, length) in enumerate(zip(chunk_sizes, context_lengths, strict=True)):
            start = length - size
            first_block = 0 if window is None else max(0, start - window + 1) // block_size
            chunks.append(_Chunk(index, size, start - first_block * block_size, first_row, first_block))
            first_row += size
        chunks.sort(key=lambda chunk: (chunk.size, chunk.length))
        together = _together(chunks, num_heads, head_dim)
        return cls(tuple(_group(each, block_tables_PB, num_kv_heads, block_size, window) for each in together))


def prefill_attention(query_QHd: Tensor, keys: Tensor, values: Tensor, plan: PrefillPlan, scale: float) -> Tensor:
    """Causal attention of prompt chunks over everything cached before them and themselves: [Q, H, d]."""
    num_kv_heads, _, head_dim = keys.shape[1:]
    output_QHd = torch.empty_like(query_QHd)
    in_bfloat16 = keys.dtype is torch.bfloat16 and _has_bfloat16_products()
    wide = torch.float32 if keys.element_size() <= 2 else keys.dtype
    weights = torch.bfloat16 if in_bfloat16 else wide
    for group in plan.groups:
        shape = (group.num_chunks, -1, num_kv_heads, query_QHd.shape[1] // num_kv_heads, head_dim)
        query_CKGQd = query_QHd[group.rows].view(shape).permute(0, 2, 3, 1, 4)
        tiles = (cache.view(-1, cache[0, 0].numel()).index_select(0, group.blocks) for cache in (keys, values))
        keys_CKLd, values_CKLd = (tile.view(group.num_chunks, num_kv_heads, -1, head_dim) for tile in tiles)
        keys_CKLd, values_CKLd = keys_CKLd.to(wide), values_CKLd.to(weights)
        into = output_QHd[group.rows]  # a view, or for scattered rows a copy that is put in place below
        into_CKGQd = into.view(shape).permute(0, 2, 3, 1, 4)
        for tile in group.tiles:
            for heads in _heads(tile, group.num_chunks, query_CKGQd):
                into_CKGQd[:, heads, :, tile.queries] = _attend(
                    _widened(query_CKGQd[:, heads, :, tile.queries], wide),
                    keys_CKLd[:, heads, tile.keys],
                    values_CKLd[:, heads, tile.keys],
                    tile.hidden,
                    scale,
                    in_bfloat16=in_bfloat16,
                )
        if isinstance(group.rows, Tensor):
            output_QHd.index_copy_(0, group.rows, into)
    return output_QHd


def _has_bfloat16_products() -> bool:
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _attend(
    query_CKGnd: Tensor, keys_CKLd: Tensor, values_CKLd: Tensor, hidden: Tensor, scale: float, *, in_bfloat16: bool
) -> Tensor:
    """One tile: [C, K, G, n, d]. Query heads of a group are rows of one product."""
    keys_BLd, values_BLd = keys_CKLd.flatten(0, 1), values_CKLd.flatten(0, 1)
    query_BMd = query_CKGnd.view(len(keys_BLd), -1, query_CKGnd.shape[-1])
    with _float32_products(in_bfloat16=in_bfloat16):
        scores_BML = torch.bmm(query_BMd, keys_BLd.transpose(1, 2))
    scores = scores_BML.mul_(scale).view(*query_CKGnd.shape[:-1], -1)
    scores[..., scores.shape[-1] - hidden.shape[-1] :] += hidden
    torch.softmax(scores_BML, dim=-1, out=scores_BML)
    return torch.bmm(scores_BML.to(values_BLd.dtype), values_BLd).view_as(query_CKGnd)


def _widened(query_CKGnd: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy of that dtype, not scaled yet: its elements must stay those of the narrower one."""
    return torch.empty(query_CKGnd.shape, dtype=dtype, device=query_CKGnd.device).copy_(query_CKGnd)


# The setting below belongs to the process: two engines in one must not restore each other's.
_setting_lock = threading.Lock()


@contextmanager
def _float32_products(*, in_bfloat16: bool) -> Iterator[None]:
    """In the context oneDNN computes float32 products, and may round factors to bfloat16; sums stay float32."""
    if not in_bfloat16:
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _setting_lock:
        before = settings.fp32_precision
        settings.fp32_precision = "bf16"
        try:
            yield
        finally:
            settings.fp32_precision = before


def _heads(tile: Tile, num_chunks: int, query_CKGQd: Tensor) -> Iterator[slice]:
    """Ranges of KV heads whose scores have room; all of them where there are several chunks."""
    num_kv_heads, group_size = query_CKGQd.shape[1:3]
    step = num_kv_heads
    if num_chunks == 1:
        rows = group_size * (tile.queries.stop - tile.queries.start)
        step = max(1, _LARGEST_BYTES // (4 * rows * (tile.keys.stop - tile.keys.start)))
    for first in range(0, num_kv_heads, step):
        yield slice(first, min(first + step, num_kv_heads))


def _together(chunks: Sequence[_Chunk], num_heads: int, head_dim: int) -> Iterator[list[_Chunk]]:
    """Chunks, in order, as far as padding them to the largest is worth it and their scores have room."""
    together: list[_Chunk] = []
    size = length = work = 0
    for chunk in chunks:
        size, length, work = max(size, chunk.size), max(length, chunk.length), work + chunk.size * chunk.length
        padded = (len(together) + 1) * size * length
        num_elements = num_heads * max(min(size, _TILE) * length, size * head_dim)
        num_bytes = 4 * (len(together) + 1) * num_elements
        if together and (padded > max(_LARGEST_PADDED * work, work + _FREE_PADDING) or num_bytes > _LARGEST_BYTES):
            yield together
            together, size, length, work = [], chunk.size, chunk.length, chunk.size * chunk.length
        together.append(chunk)
    if together:
        yield together


def _group(
    chunks: Sequence[_Chunk], block_tables_PB: Tensor, num_kv_heads: int, block_size: int, window: int | None
) -> Group:
    """The tensors of one group."""
    device = block_tables_PB.device
    size, length = max(chunk.size for chunk in chunks), max(chunk.length for chunk in chunks)
    starts, sizes, firsts, indices, first_blocks = torch.tensor(
        [[c.start, c.size, c.first_row, c.index, c.first_block] for c in chunks], device=device
    ).T
    columns = first_blocks[:, None] + torch.arange(-(-length // block_size), device=device)
    # Padding reads whatever block the table names there: none of its tokens is seen, and all are finite.
    tables_CB = block_tables_PB[indices[:, None], columns.clamp_(max=block_tables_PB.shape[1] - 1)]
    tiles_CKB = tables_CB[:, None] * num_kv_heads + torch.arange(num_kv_heads, device=device)[:, None]
    offsets_CQ = torch.minimum(torch.arange(size, device=device), sizes[:, None] - 1)
    follows = [first.first_row + size == second.first_row for first, second in pairwise(chunks)]
    if all(follows) and chunks[0].size == size:
        rows: slice | Tensor = slice(chunks[0].first_row, chunks[0].first_row + len(chunks) * size)
    else:
        rows = (firsts[:, None] + offsets_CQ).flatten()
    positions_CQ = starts[:, None] + offsets_CQ
    if all(chunk.start == chunks[0].start and chunk.size == size for chunk in chunks):
        positions_CQ = positions_CQ[:1]
    most = max(chunk.start for chunk in chunks)
    step = _TILE if length < _LONG else _LARGE_TILE
    tiles = tuple(
        _tile(slice(first, min(first + step, size)), min(most + first + step, length), positions_CQ, window)
        for first in range(0, size, step)
    )
    return Group(num_chunks=len(chunks), rows=rows, blocks=tiles_CKB.flatten(), tiles=tiles)


def _tile(queries: slice, stop: int, positions_CQ: Tensor, window: int | None) -> Tile:
    """`stop`: the key after the last that a query sees."""
    positions_Cn1 = positions_CQ[:, queries, None]
    if window is None:
        first, hidden_from = 0, int(positions_Cn1.min()) + 1
    else:
        first = hidden_from = max(0, int(positions_Cn1.min()) - window + 1)
    keys_L = torch.arange(min(hidden_from, stop), stop, device=positions_CQ.device)
    visible = keys_L <= positions_Cn1
    if window is not None:
        visible &= keys_L > positions_Cn1 - window
    hidden = torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -torch.inf)
    return Tile(queries=queries, keys=slice(first, stop), hidden=hidden[:, None, None])
