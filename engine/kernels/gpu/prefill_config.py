"""`PrefillConfig`: tile, warps and stages of prefill attention, and which of the candidates a model gets.

At d = 128 a tile of 128 x 128 is 2,048 cycles of tensor cores and about 1,100 of softmax. Two warpgroups of 64 rows
hold results, scores and weights in about 245 registers; three stages of keys and values and the queries take 224 KiB,
so an SM holds one CTA. Tiles of 64 keys waste less on the diagonal (a quarter of a short prompt) but leave products
at half their width; with 128 registers two CTAs of them fit an SM, and one's softmax hides behind the other's products.
These are estimates: `CANDIDATES` is what a benchmark should time.
"""

import functools
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig:
    """One way to launch the kernel."""

    rows: int  # queries x heads of a tile
    tile: int  # keys met at once
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def shared_bytes(self, *, head_dim: int, cache_bytes: int, query_bytes: int) -> int:
        """Shared memory of a CTA, roughly: queries once, keys and values in every stage."""
        width = 1 << (head_dim - 1).bit_length()
        return (self.rows * query_bytes + self.num_stages * 2 * self.tile * cache_bytes) * width


# By head dimension, rounded up to a power of two; for queries of two bytes. The first of each is the one used.
CANDIDATES = {
    64: (
        PrefillConfig(rows=128, tile=64, num_warps=4, num_stages=3),
        PrefillConfig(rows=128, tile=128, num_warps=8, num_stages=3),
    ),
    128: (
        PrefillConfig(rows=128, tile=128, num_warps=8, num_stages=3),
        PrefillConfig(rows=128, tile=64, num_warps=8, num_stages=3),
        PrefillConfig(rows=128, tile=64, num_warps=8, num_stages=2, max_registers=128),
        PrefillConfig(rows=64, tile=64, num_warps=4, num_stages=3),
    ),
    256: (
        PrefillConfig(rows=128, tile=32, num_warps=8, num_stages=3),
        PrefillConfig(rows=128, tile=64, num_warps=8, num_stages=2),
    ),
}
# Products of float32 are exact and so not for tensor cores: right rather than fast.
FLOAT32 = PrefillConfig(rows=32, tile=32, num_warps=4, num_stages=2)


def packed_heads(group_size: int, rows: int) -> int:
    """Heads in a tile: as many as divide the group and leave 16 queries, a power of two."""
    return min(group_size & -group_size, rows // 16)


@functools.lru_cache(maxsize=256)
def prefill_config(*, head_dim: int, query_bytes: int) -> PrefillConfig:
    """A pure function of the model."""
    if query_bytes == 4:
        return FLOAT32
    return next(candidates[0] for width, candidates in CANDIDATES.items() if head_dim <= width)
