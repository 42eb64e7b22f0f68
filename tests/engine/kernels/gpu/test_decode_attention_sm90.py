"""What decode attention takes of an SM in its real configurations, and that its loads run ahead, from the compiler."""

import pytest

from engine.kernels.gpu.decode_config import CANDIDATES, CORESIDENT, DecodeConfig, decode_config, padded_rows
from engine.kernels.gpu.decode_shares import attend_shares
from engine.kernels.gpu.gemm_config import CORESIDENT as CORESIDENT_GEMM
from tests.engine.kernels.gpu.sm90 import (
    LARGEST_SHARED_BYTES,
    REGISTERS_PER_SM,
    RESERVED_SHARED_BYTES,
    SHARED_BYTES_PER_SM,
    Resources,
    Sm90Compiler,
)

pytestmark = pytest.mark.slow
BYTES = {"fp8e4nv": 1, "bf16": 2, "fp16": 2, "fp32": 4}


def chosen(cache: str, query: str, head_dim: int, group_size: int, num_ctas: int) -> DecodeConfig:
    return decode_config(
        head_dim=head_dim,
        group_size=group_size,
        cache_bytes=BYTES[cache],
        query_bytes=BYTES[query],
        num_ctas=num_ctas,
    )


def compiled(
    sm90: Sm90Compiler,
    config: DecodeConfig,
    *,
    cache: str = "bf16",
    query: str = "bf16",
    head_dim: int = 128,
    group_size: int = 4,
    block_size: int = 64,
) -> Resources:
    tensors = {"query": f"*{query}", "keys": f"*{cache}", "values": f"*{cache}", "output": f"*{query}"}
    scratch = {"num_planned": "*i32", "tiles": "*i32", "places": "*i32"}
    scratch |= {"partial_sums": "*i16", "partial_weights": "*fp32"}
    numbers = {"score_scale": "fp32", "value_scale": "fp32"}
    numbers |= dict.fromkeys(["query_stride", "output_stride", "capacity"], "i32")
    return sm90.compiled(
        attend_shares,
        tensors | scratch | numbers,
        {
            "NUM_KV_HEADS": 8,
            "GROUP": group_size,
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": block_size,
            "TILE": config.tile,
            "ROWS": padded_rows(group_size),
            "WIDTH": 1 << (head_dim - 1).bit_length(),
        },
        config.num_warps,
        config.num_stages,
        divisible=["query_stride", "output_stride", "capacity"],
        maxnreg=config.max_registers,
    )


@pytest.mark.parametrize("num_ctas", [40, 264])
@pytest.mark.parametrize(
    ("cache", "query", "head_dim", "group_size", "block_size"),
    [
        ("bf16", "bf16", 128, 4, 64),
        ("bf16", "bf16", 128, 4, 16),
        ("fp16", "fp16", 64, 8, 128),
        ("bf16", "bf16", 96, 1, 64),
        ("bf16", "bf16", 256, 2, 64),
        ("fp8e4nv", "bf16", 128, 4, 64),
        ("fp8e4nv", "bf16", 128, 8, 16),
        ("fp8e4nv", "bf16", 64, 4, 64),
        ("fp32", "fp32", 128, 4, 64),
    ],
)
def test_as_many_fit_as_are_launched(
    cache: str, query: str, head_dim: int, group_size: int, block_size: int, num_ctas: int, sm90: Sm90Compiler
) -> None:
    """Two on each SM where there are twice as many; no registers spilled; shared memory as `shared_bytes` says."""
    config = chosen(cache, query, head_dim, group_size, num_ctas)
    resources = compiled(
        sm90, config, cache=cache, query=query, head_dim=head_dim, group_size=group_size, block_size=block_size
    )
    assert resources.spill_bytes == 0
    assert resources.shared_bytes <= LARGEST_SHARED_BYTES
    if num_ctas == 264:
        assert 2 * (resources.shared_bytes + RESERVED_SHARED_BYTES) <= SHARED_BYTES_PER_SM
        assert 2 * resources.cta_registers <= REGISTERS_PER_SM
    predicted = config.shared_bytes(
        head_dim=head_dim,
        rows=padded_rows(group_size),
        cache_bytes=BYTES[cache],
        query_bytes=BYTES[query],
    )
    assert resources.shared_bytes <= predicted


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_loads_stay_ahead_of_products(block_size: int, sm90: Sm90Compiler) -> None:
    """The loop waits with all groups but its own tile's under way (keys, values and queries of each later tile): no
    load that it needs at once, such as a block's number, stands among them. Both products are wgmma.
    """
    config = chosen("bf16", "bf16", 128, 4, 40)
    ptx = compiled(sm90, config, block_size=block_size).ptx
    assert f"cp.async.wait_group \t{3 * (config.num_stages - 2)};" in ptx
    assert ptx.count("wgmma.mma_async") == 128 // 16 + 2 * 64 // 16
    assert "mma.sync" not in ptx
    assert "cp.async.ca" not in ptx


@pytest.mark.parametrize("tile", [16, 32, 64, 128])
def test_candidates_compile_without_spills(tile: int, sm90: Sm90Compiler) -> None:
    """Of what a benchmark may try at Llama-3-8B's shapes, the most stages of a tile that fit an SM."""
    predicted, config = max(
        (config.shared_bytes(head_dim=128, rows=16, cache_bytes=2, query_bytes=2), config)
        for config in CANDIDATES
        if config.tile == tile
        and config.shared_bytes(head_dim=128, rows=16, cache_bytes=2, query_bytes=2) <= LARGEST_SHARED_BYTES
    )
    resources = compiled(sm90, config)
    assert resources.spill_bytes == 0
    assert resources.shared_bytes <= predicted


def test_one_fits_beside_a_gemm(sm90: Sm90Compiler) -> None:
    resources = compiled(sm90, CORESIDENT)
    gemm_shared = CORESIDENT_GEMM.stage_bytes() + 1024 + RESERVED_SHARED_BYTES
    assert resources.spill_bytes == 0
    assert resources.registers <= 104
    assert resources.shared_bytes + RESERVED_SHARED_BYTES + gemm_shared <= SHARED_BYTES_PER_SM
