"""What prefill attention takes of an SM in its real configurations, and that its loads run ahead, from the compiler."""

import pytest

from engine.kernels.gpu.prefill_attention import attend_chunks, attend_chunks_limited
from engine.kernels.gpu.prefill_config import CANDIDATES, PrefillConfig, packed_heads, prefill_config
from tests.engine.kernels.gpu.sm90 import LARGEST_SHARED_BYTES, REGISTERS_PER_SM, Resources, Sm90Compiler

pytestmark = pytest.mark.slow
# An SM's stack is not memory that anyone waits for, unless there is much of it.
FEW_BYTES = 64


def compiled(
    sm90: Sm90Compiler,
    config: PrefillConfig,
    *,
    cache: str = "bf16",
    query: str = "bf16",
    head_dim: int = 128,
    group_size: int = 4,
    block_size: int = 64,
    has_window: bool = False,
    is_limited: bool = False,
) -> Resources:
    tensors = {"query": f"*{query}", "keys": f"*{cache}", "values": f"*{cache}", "output": f"*{query}"}
    indices = dict.fromkeys(["block_tables", "query_starts", "context_lengths"], "*i32")
    strides = dict.fromkeys(["query_stride", "output_stride", "table_stride"], "i32")
    numbers = dict.fromkeys(["num_tokens", "num_sequences", "num_tiles", "window"], "i32")
    return sm90.compiled(
        attend_chunks_limited if is_limited else attend_chunks,
        tensors | indices | strides | numbers | {"score_scale": "fp32", "value_scale": "fp32"},
        {
            "HAS_WINDOW": has_window,
            "NUM_KV_HEADS": 8,
            "GROUP": group_size,
            "PACKED": packed_heads(group_size, config.rows),
            "HEAD_DIM": head_dim,
            "WIDTH": 1 << (head_dim - 1).bit_length(),
            "BLOCK_SIZE": block_size,
            "ROWS": config.rows,
            "TILE": config.tile,
            "SEARCH": 256,
        },
        config.num_warps,
        config.num_stages,
        divisible=["query_stride", "output_stride"],
        maxnreg=config.max_registers,
    )


@pytest.mark.parametrize(
    ("cache", "head_dim", "group_size", "block_size", "has_window"),
    [
        ("bf16", 128, 4, 64, False),
        ("bf16", 128, 4, 64, True),
        ("bf16", 128, 1, 16, False),
        ("fp16", 64, 8, 128, True),
        ("bf16", 96, 3, 32, False),
        ("bf16", 256, 2, 64, True),
        ("fp8e4nv", 128, 4, 64, False),
    ],
)
def test_chosen_configurations_fit_without_spills(
    cache: str, head_dim: int, group_size: int, block_size: int, has_window: bool, sm90: Sm90Compiler
) -> None:
    config = prefill_config(head_dim=head_dim, query_bytes=2)
    query = "fp16" if cache == "fp16" else "bf16"
    resources = compiled(
        sm90,
        config,
        cache=cache,
        query=query,
        head_dim=head_dim,
        group_size=group_size,
        block_size=block_size,
        has_window=has_window,
    )
    assert resources.spill_bytes == 0
    assert resources.shared_bytes <= LARGEST_SHARED_BYTES
    assert resources.cta_registers <= REGISTERS_PER_SM
    assert "wgmma.mma_async" in resources.ptx
    assert "mma.sync" not in resources.ptx
    # Keys and values of the next tile stay under way while the loop waits for its own.
    assert "cp.async.wait_group \t2;" in resources.ptx


@pytest.mark.parametrize(("width", "config"), [(width, config) for width in CANDIDATES for config in CANDIDATES[width]])
def test_candidates_compile(width: int, config: PrefillConfig, sm90: Sm90Compiler) -> None:
    """All that a benchmark may try can be launched; some spill a little."""
    resources = compiled(sm90, config, head_dim=width)
    assert resources.spill_bytes <= 8 * FEW_BYTES
    assert resources.shared_bytes <= LARGEST_SHARED_BYTES


@pytest.mark.parametrize(("cache", "head_dim"), [("bf16", 128), ("bf16", 64), ("fp8e4nv", 128)])
def test_programs_that_walk_over_tiles_are_as_good(cache: str, head_dim: int, sm90: Sm90Compiler) -> None:
    resources = compiled(
        sm90, prefill_config(head_dim=head_dim, query_bytes=2), cache=cache, head_dim=head_dim, is_limited=True
    )
    assert resources.spill_bytes <= FEW_BYTES
    assert resources.shared_bytes <= LARGEST_SHARED_BYTES
    assert resources.cta_registers <= REGISTERS_PER_SM
    assert "cp.async.wait_group \t2;" in resources.ptx


def test_float32_compiles(sm90: Sm90Compiler) -> None:
    resources = compiled(sm90, prefill_config(head_dim=128, query_bytes=4), cache="fp32", query="fp32")
    assert resources.shared_bytes <= LARGEST_SHARED_BYTES
