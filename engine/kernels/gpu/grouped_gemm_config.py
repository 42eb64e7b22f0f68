"""Tiles of the grouped GEMM: chosen from how many copies an expert gets on average, as how many it gets is unknown.

The host does not know the routing, so the choice is a pure function of sizes it knows. Every expert adds a tile of rows
that is partly empty; with few copies each, small tiles lose less. A gated tile keeps two sets of sums, gate and up, so
its `columns` are half of a plain one's for the same registers and the same bytes per stage.
"""

import functools

from engine.kernels.gpu.gemm_config import GemmConfig, tile_seconds

GATED_CANDIDATES = (
    GemmConfig(rows=128, columns=128, num_warps=8, num_stages=4, group=16, epilogue_parts=4),
    GemmConfig(rows=64, columns=128, num_warps=4, num_stages=5, group=16, epilogue_parts=4),
    GemmConfig(rows=64, columns=64, num_warps=4, num_stages=6, group=16, epilogue_parts=2),
)
PLAIN_CANDIDATES = (
    GemmConfig(rows=128, columns=256, num_warps=8, num_stages=4, group=16, epilogue_parts=8),
    GemmConfig(rows=128, columns=128, num_warps=8, num_stages=6, group=16, epilogue_parts=4),
    GemmConfig(rows=64, columns=256, num_warps=4, num_stages=5, group=16, epilogue_parts=8),
    GemmConfig(rows=64, columns=128, num_warps=4, num_stages=6, group=16, epilogue_parts=4),
)


@functools.lru_cache(maxsize=4096)
def choose_grouped_config(
    num_copies: int,
    num_experts: int,
    num_columns: int,
    num_inner: int,
    num_sms: int,
    is_gated: bool,
    element_bytes: int = 2,
) -> GemmConfig:
    """The candidate with the fewest predicted seconds for copies spread evenly; of equals the one with larger tiles."""

    def seconds(config: GemmConfig) -> float:
        tiles = expected_row_tiles(num_copies, num_experts, config.rows) * -(-num_columns // config.columns)
        loaded_columns = config.columns * (2 if is_gated else 1)
        return -(-tiles // num_sms) * tile_seconds(config, num_inner, element_bytes, loaded_columns)

    return min(GATED_CANDIDATES if is_gated else PLAIN_CANDIDATES, key=seconds)


def expected_row_tiles(num_copies: int, num_experts: int, rows: int) -> int:
    """Row tiles of as many experts as can have copies, each with the average number, rounded up."""
    num_used = min(num_copies, num_experts)
    return num_used * -(-num_copies // (num_used * rows)) if num_used else 0
