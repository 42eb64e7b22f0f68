"""A kernel that only reads: how many bytes per second so many programs get from the device's memory.

Every program walks its share of tiles, 32 KiB each, with three of them under way: 96 KiB, what a multiprocessor needs
in flight where few of them read (4 TB/s for 0.8 us over 40 of them are 80 KiB each).
"""

# mypy: disable-error-code="misc, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_WORDS = 8192  # int32
_NUM_WARPS = 16
_NUM_STAGES = 4


def read_all(source: Tensor, sums: Tensor, num_ctas: int) -> None:
    """Read an int32 tensor whose size is a multiple of TILE_WORDS; `sums`, int32 of `num_ctas`, shows that it was."""
    _read[(num_ctas,)](
        source, sums, source.numel() // TILE_WORDS, TILE=TILE_WORDS, STAGES=_NUM_STAGES, num_warps=_NUM_WARPS
    )


def allocate_source(num_bytes: int, device: torch.device) -> Tensor:
    """Random words, at least one tile."""
    num_tiles = max(1, num_bytes // (4 * TILE_WORDS))
    return torch.randint(-(2**31), 2**31 - 1, (num_tiles * TILE_WORDS,), dtype=torch.int32, device=device)


@triton.jit
def _read(source: tl.tensor, sums: tl.tensor, num_tiles: tl.tensor, TILE: tl.constexpr, STAGES: tl.constexpr) -> None:
    places = tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.int32)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=STAGES):
        total ^= tl.load(source + tl.cast(tile, tl.int64) * TILE + places)
    tl.store(sums + tl.program_id(0), tl.xor_sum(total, axis=0))
