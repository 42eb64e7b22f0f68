"""Prefill attention on a CPU, by matrix products: `reference.prefill_attention`, in bfloat16 2 to 4 times as fast.

A unit of the work is a tile of a chunk's queries for one KV head, with the blocks that hold the keys it can see.
Units of similar size and context are padded to one another and attended together, by `fused.attend_tiles`. What
depends on the shape of the step alone is in a `PrefillPlan`, made once for all layers.

Legend: as in `reference`; further U units of a group, n queries of each (padded), B blocks.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels import fused
from engine.kernels.compiled import CompiledKernel

# Queries of a chunk that are attended at once. Fewer skip more of the keys after them, more keep the products large: a
# chunk whose context is at least _LONG takes the larger tile.
_TILE, _LARGE_TILE = 64, 128
_LONG = 1024
# Of the scores of a group: more would leave the processor's caches before they are used.
_LARGEST_BYTES = 2**22
# What units may be padded to be attended together: a share of their work, and scores for which a call is worse.
_LARGEST_PADDED = 1.25
_FREE_PADDING = 2**12


@dataclass(frozen=True, slots=True)
class Group:
    """Units that are attended together.

    `rows` [U, n] are their queries: token * K + KV head; a short unit repeats its last. `tiles` [U, B] are the tiles of
    the cache that hold their context: block id * K + KV head. The i-th query of a unit sees the keys before
    `limits` [U, n].
    """

    rows: Tensor
    tiles: Tensor
    limits: Tensor


@dataclass(frozen=True, slots=True)
class _Unit:
    """Some queries of chunk `index`, for one KV head: from `first_row` of the step on, at positions `start`, ...

    Positions count from the first token of `first_block`, the first block of the sequence that is read.
    """

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
    """Which queries are attended together, and what each of them sees."""

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
        block_size: int,
        window: int | None,
    ) -> "PrefillPlan":
        """Chunk i is the last `chunk_sizes[i]` of its sequence's `context_lengths[i]` cached tokens."""
        units: list[_Unit] = []
        first_row = 0
        for index, (size, length) in enumerate(zip(chunk_sizes, context_lengths, strict=True)):
            tile = _TILE if length < _LONG else _LARGE_TILE
            for first in range(0, size, tile):
                start = length - size + first
                first_block = 0 if window is None else max(0, start - window + 1) // block_size
                units.append(
                    _Unit(
                        index, min(tile, size - first), start - first_block * block_size, first_row + first, first_block
                    )
                )
            first_row += size
        units.sort(key=lambda unit: (unit.size, unit.length))
        groups: list[Group] = []
        for together in _together(units, num_heads):
            num_bytes = num_heads * _score_bytes(together)
            heads_K = torch.arange(num_kv_heads, device=block_tables_PB.device)
            for some_K in torch.split(heads_K, max(1, num_kv_heads * _LARGEST_BYTES // num_bytes)):
                groups.append(_group(together, some_K, num_kv_heads, block_tables_PB, block_size))
        return cls(tuple(groups))


def prefill_attention(
    query_QHd: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: PrefillPlan,
    *,
    scale: float,
    window: int | None,
    compiled: CompiledKernel | None = None,
) -> Tensor:
    """Causal attention of prompt chunks over everything cached before them and themselves: [Q, H, d].

    `compiled` computes `fused.attend_tiles` with this scale and window, where it is given.
    """
    output_QHd = torch.empty_like(query_QHd)
    with _float32_products(in_bfloat16=keys.dtype is torch.bfloat16 and fused.has_bfloat16_products()):
        for group in plan.groups:
            tensors = query_QHd, keys, values, group.rows, group.tiles, group.limits, output_QHd
            if compiled is not None:
                compiled(*tensors)
            else:
                fused.attend_tiles(*tensors, scale=scale, window=window)
    return output_QHd


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


def _score_bytes(units: Sequence[_Unit]) -> int:
    """Of one query head, each unit padded to the largest."""
    return 4 * len(units) * max(unit.size for unit in units) * max(unit.length for unit in units)


def _together(units: Sequence[_Unit], num_heads: int) -> Iterator[list[_Unit]]:
    """Units, in order, as far as padding them to the largest is worth it and their scores have room."""
    together: list[_Unit] = []
    size = length = work = 0
    for unit in units:
        size, length, work = max(size, unit.size), max(length, unit.length), work + unit.size * unit.length
        padded = (len(together) + 1) * size * length
        too_much = padded > max(_LARGEST_PADDED * work, work + _FREE_PADDING)
        if together and (too_much or 4 * num_heads * padded > _LARGEST_BYTES):
            yield together
            together, size, length, work = [], unit.size, unit.length, unit.size * unit.length
        together.append(unit)
    if together:
        yield together


def _group(
    units: Sequence[_Unit], heads_K: Tensor, num_kv_heads: int, block_tables_PB: Tensor, block_size: int
) -> Group:
    """The units, once for each of these KV heads."""
    device = block_tables_PB.device
    size, length = max(unit.size for unit in units), max(unit.length for unit in units)
    indices, sizes, starts, first_rows, first_blocks = torch.tensor(
        [[unit.index, unit.size, unit.start, unit.first_row, unit.first_block] for unit in units], device=device
    ).T
    offsets_Un = torch.minimum(torch.arange(size, device=device), sizes[:, None] - 1)
    columns_UB = first_blocks[:, None] + torch.arange(-(-length // block_size), device=device)
    # Padding reads whatever block the table names there: none of its tokens is seen, and all are finite.
    blocks_UB = block_tables_PB[indices[:, None], columns_UB.clamp_(max=block_tables_PB.shape[1] - 1)]
    rows_KUn = (first_rows[:, None] + offsets_Un) * num_kv_heads + heads_K[:, None, None]
    limits_Un = starts[:, None] + offsets_Un + 1
    return Group(
        rows=rows_KUn.flatten(0, 1),
        tiles=(blocks_UB * num_kv_heads + heads_K[:, None, None]).flatten(0, 1),
        limits=limits_Un.repeat(len(heads_K), 1),
    )
