"""`GemmConfig`: tile, warps and stages of a persistent GEMM, and which of the candidates a shape gets.

Legend: T rows (tokens), N outputs, K inner. Tiles are handed to a constant number of programs, so a shape is computed
in ceil(tiles / programs) rounds, the last of which may be nearly empty: wave quantisation, which decides between tiles
more often than their own speed does. The choice is a pure function of the shape, never a timing at run time: a CUDA
graph and a rerun get the same kernel, hence the same rounding.
"""

import functools
from dataclasses import dataclass

# What an SM of an H200 sustains inside a large product: estimates for choosing (8 TB/s from L2, 730 TFLOP/s in bfloat16
# over 132 SMs), not measurements; only their ratios matter here.
_FLOPS_PER_SM = 5.5e12
_BYTES_PER_SM = 62e9
# First loads of a tile until its first product, and the last product until its results are on their way.
_TILE_SECONDS = 1.5e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmConfig:
    """One way to launch the kernel. A stage holds `inner_bytes` of each row of both tiles: one swizzled TMA box."""

    rows: int  # of a tile: tokens
    columns: int  # of a tile: outputs
    num_warps: int
    num_stages: int
    group: int  # tiles of rows that share the weights they meet in L2
    epilogue_parts: int = 1  # a tile is written in so many column slices, which bounds the registers of the epilogue
    inner_bytes: int = 128
    max_registers: int | None = None

    def inner(self, element_bytes: int) -> int:
        """Inner elements per stage."""
        return self.inner_bytes // element_bytes

    def num_tiles(self, num_rows: int, num_columns: int) -> int:
        """Tiles of a [T, N] output."""
        return -(-num_rows // self.rows) * -(-num_columns // self.columns)

    def stage_bytes(self) -> int:
        """Shared memory of all stages together; barriers come on top."""
        return (self.rows + self.columns) * self.inner_bytes * self.num_stages


# 128 x 256 has the fewest bytes per flop that fit: accumulators take 128 of each thread's registers. Four stages (192
# KiB) cover the latency of L2 and most of that of HBM. Groups make the rows and the columns of one wave about equal.
# The epilogue's slices are 32 columns, 64 bytes of a row: wider ones spill registers where N is no multiple of 16.
CANDIDATES = (
    GemmConfig(rows=128, columns=256, num_warps=8, num_stages=4, group=16, epilogue_parts=8),
    GemmConfig(rows=128, columns=128, num_warps=8, num_stages=6, group=12, epilogue_parts=4),
    GemmConfig(rows=64, columns=256, num_warps=4, num_stages=5, group=16, epilogue_parts=8),
    GemmConfig(rows=64, columns=128, num_warps=4, num_stages=6, group=16, epilogue_parts=4),
    GemmConfig(rows=64, columns=64, num_warps=4, num_stages=8, group=16, epilogue_parts=2),
)
# Leaves room on every SM for one attention CTA of 128 threads: three stages are 144 KiB, and 200 registers of 256
# threads leave 112 for each of 128 others. Slower alone than four stages; to be used only where it overlaps, and spills
# where N is no multiple of 16.
CORESIDENT = GemmConfig(rows=128, columns=256, num_warps=8, num_stages=3, group=16, epilogue_parts=8, max_registers=200)


@functools.lru_cache(maxsize=4096)
def choose_config(num_rows: int, num_columns: int, num_inner: int, num_sms: int, element_bytes: int = 2) -> GemmConfig:
    """The candidate with the smallest `predicted_seconds`; of equals the one with the larger tile."""
    return min(
        CANDIDATES,
        key=lambda config: predicted_seconds(config, num_rows, num_columns, num_inner, num_sms, element_bytes),
    )


def predicted_seconds(
    config: GemmConfig, num_rows: int, num_columns: int, num_inner: int, num_sms: int, element_bytes: int = 2
) -> float:
    """Rounds of tiles times the time of one."""
    rounds = -(-config.num_tiles(num_rows, num_columns) // num_sms)
    return rounds * tile_seconds(config, num_inner, element_bytes, config.columns)


def tile_seconds(config: GemmConfig, num_inner: int, element_bytes: int, loaded_columns: int) -> float:
    """Time of one tile: its products or its loads from L2, whichever is longer, its beginning and its end."""
    inner = config.inner(element_bytes)
    flops = 2 * config.rows * loaded_columns * inner * element_bytes / 2  # FP8 products take half the time
    loaded_bytes = (config.rows + loaded_columns) * config.inner_bytes
    stage_seconds = max(flops / _FLOPS_PER_SM, loaded_bytes / _BYTES_PER_SM)
    written_bytes = config.rows * config.columns * 2
    return -(-num_inner // inner) * stage_seconds + _TILE_SECONDS + written_bytes / _BYTES_PER_SM


def wave_efficiency(config: GemmConfig, num_rows: int, num_columns: int, num_sms: int) -> float:
    """Useful share of the products that `num_sms` SMs could do in the rounds that the shape takes, 0 to 1."""
    rounds = -(-config.num_tiles(num_rows, num_columns) // num_sms)
    return num_rows * num_columns / (rounds * num_sms * config.rows * config.columns)


def gemm_flops(num_rows: int, num_columns: int, num_inner: int) -> int:
    """Additions and multiplications of [T, K] x [K, N], the T rows of all experts together where there are several."""
    return 2 * num_rows * num_columns * num_inner
