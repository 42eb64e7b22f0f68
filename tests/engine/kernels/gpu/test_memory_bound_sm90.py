"""Memory-bound kernels compiled for sm_90 at Llama-3-8B's shapes: 16 bytes an access, no spills, enough warps."""

import re

import pytest

from engine.kernels.gpu import all_reduce_add, rotary
from tests.engine.kernels.gpu.sm90 import REGISTERS_PER_SM, SHARED_BYTES_PER_SM, Resources, Sm90Compiler

pytestmark = pytest.mark.slow

PACKAGE = "engine.kernels.gpu."
NORM = {
    **dict.fromkeys(("hidden", "residual", "new_residual", "weight", "output"), "*bf16"),
    "scales": "*fp32",
    "num_rows": "i32",
    "width": "i32",
    "epsilon": "fp32",
}
ROTARY = {
    **dict.fromkeys(("qkv", "query_weight", "key_weight", "query"), "*bf16"),
    **dict.fromkeys(("positions", "slots"), "*i64"),
    **dict.fromkeys(("keys", "values"), "*bf16"),
    "table": "*fp32",
    **dict.fromkeys(("num_tokens", "num_positions", "num_slots"), "i32"),
    **dict.fromkeys(("epsilon", "key_scale", "value_scale"), "fp32"),
}
SILU = {"gate_up": "*bf16", "output": "*bf16", "num_rows": "i32", "width": "i32"}
ADD = {
    **{f"partial_{rank}": "*bf16" for rank in range(all_reduce_add.MAX_RANKS)},
    "residual": "*bf16",
    "output": "*bf16",
    "size": "i32",
    "gap": "i32",
}
EMBEDDING = {
    "tokens": "*i64",
    "weight": "*bf16",
    "output": "*bf16",
    **dict.fromkeys(("first_row", "num_rows", "num_tokens", "width"), "i32"),
}
QUANTISE = {"hidden": "*bf16", "output": "*fp8e4nv", "scales": "*fp32", "num_rows": "i32", "width": "i32"}
DRAW = {
    "logits": "*fp32",
    "seeds": "*i64",
    "positions": "*i64",
    "temperatures": "*fp64",
    **dict.fromkeys(("threshold_keys", "threshold_ids", "ranked_rows", "parts"), "*i32"),
    **dict.fromkeys(("vocab_size", "row_stride", "tiles_per_split"), "i32"),
}
THRESHOLD = {
    "logits": "*fp32",
    **dict.fromkeys(("temperatures", "top_ps", "min_ps"), "*fp64"),
    "top_ks": "*i64",
    **dict.fromkeys(("keys", "last_ids", "by_rank"), "*i32"),
    **dict.fromkeys(("vocab_size", "row_stride"), "i32"),
}
FILTERS = {"HAS_TOP_K": True, "HAS_TOP_P": True, "HAS_MIN_P": True, "TILE": 2048}


def assert_resident(resources: Resources, num_ctas: int) -> None:
    """Nothing is spilled, and an SM holds at least this many CTAs."""
    assert resources.spill_bytes == 0
    assert resources.warnings == []
    assert resources.cta_registers * num_ctas <= REGISTERS_PER_SM
    assert (resources.shared_bytes + 1024) * num_ctas <= SHARED_BYTES_PER_SM


def narrow_accesses(resources: Resources, kind: str) -> list[str]:
    """Loads or stores ("ld" or "st") of less than 16 bytes; those of scalars and scales are among them."""
    return [found for found in re.findall(rf"{kind}\.global[\w.:]*", resources.ptx) if ".v4" not in found]


@pytest.mark.parametrize("is_limited", [False, True])
@pytest.mark.parametrize("quantises", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_norm(sm90: Sm90Compiler, adds: bool, quantises: bool, is_limited: bool) -> None:
    signature = NORM | ({"output": "*fp8e4nv"} if quantises else {})
    constants = {"ADDS": adds, "QUANTISES": quantises, "BLOCK": 4096, "STAGES": 3 if is_limited else 1}
    resources = sm90.compiled(PACKAGE + "norm:rms_norm_kernel", signature, constants, 8, 3, divisible=["width"])
    assert_resident(resources, 4)
    assert narrow_accesses(resources, "ld") == []
    assert len(narrow_accesses(resources, "st")) == quantises  # the scale
    assert ("cp.async" in resources.ptx) == is_limited
    assert ("cvt.rn.satfinite.e4m3x2.f32" in resources.ptx) == quantises


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "normalises", "cache", "stages"),
    [
        (32, 8, 128, False, "*bf16", 1),
        (32, 8, 128, False, "*bf16", 3),
        (32, 8, 128, True, "*fp8e4nv", 1),
        (4, 1, 128, False, "*bf16", 1),
        (32, 8, 64, False, "*bf16", 1),
        (28, 4, 128, False, "*bf16", 1),
        (64, 8, 128, True, "*fp8e4nv", 3),
    ],
)
def test_rotary(
    sm90: Sm90Compiler, num_heads: int, num_kv_heads: int, head_dim: int, normalises: bool, cache: str, stages: int
) -> None:
    constants = {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "BLOCK_SIZE": 64,
        "HEAD_DIM": head_dim,
        "LARGEST": 448.0,
        "NORMALISES": normalises,
        "TOKENS": rotary.tokens_of_a_program(num_heads, head_dim),
        "QUERY_HEADS": 1 << (num_heads - 1).bit_length(),
        "KV_HEADS": 1 << (num_kv_heads - 1).bit_length(),
        "STAGES": stages,
    }
    num_warps = rotary.warps_of_a_program(num_heads, head_dim)
    name = PACKAGE + "rotary:rotate_and_write_kernel"
    resources = sm90.compiled(name, ROTARY | {"keys": cache, "values": cache}, constants, num_warps, 3)
    assert_resident(resources, 4)
    if cache == "*bf16" and num_kv_heads != 4:
        assert narrow_accesses(resources, "st") == []
    else:
        assert all(".v2" in found or "b32" in found for found in narrow_accesses(resources, "st"))
    assert sum(".v2" in found for found in narrow_accesses(resources, "ld")) <= 6


def test_gate(sm90: Sm90Compiler) -> None:
    name = PACKAGE + "activation:silu_mul_kernel"
    resources = sm90.compiled(name, SILU, {"BLOCK": 2048, "STAGES": 1}, 4, 3, divisible=["width"])
    assert_resident(resources, 12)
    assert narrow_accesses(resources, "ld") + narrow_accesses(resources, "st") == []
    signature = SILU | {"output": "*fp8e4nv", "scales": "*fp32"}
    constants = {"BLOCK": 16384, "STAGES": 1}
    resources = sm90.compiled(
        PACKAGE + "activation:silu_mul_fp8_kernel", signature, constants, 16, 3, divisible=["width"]
    )
    assert_resident(resources, 2)
    assert narrow_accesses(resources, "ld") == []


@pytest.mark.parametrize(("stages", "width"), [(1, 0), (3, 0), (3, 4096)])
def test_sum_embedding_and_quantising(sm90: Sm90Compiler, stages: int, width: int) -> None:
    """`width`: of partial results that lie side by side."""
    constants: dict[str, object] = {"BLOCK": 4096, "STAGES": stages}
    ranks = {"NUM_RANKS": 2, "HAS_RESIDUAL": True, "WIDTH": width}
    name = PACKAGE + "all_reduce_add:add_partials_kernel"
    total = sm90.compiled(name, ADD, constants | ranks, 8, 3, divisible=["size", "gap"])
    embedding = sm90.compiled(PACKAGE + "embedding:embedding_kernel", EMBEDDING, constants, 8, 3, divisible=["width"])
    quantise = sm90.compiled(PACKAGE + "quantise:quantise_rows_kernel", QUANTISE, constants, 8, 3, divisible=["width"])
    for resources, num_scalars in ((total, 0), (embedding, 1), (quantise, 0)):
        assert_resident(resources, 4)
        assert len(narrow_accesses(resources, "ld")) <= num_scalars
    assert narrow_accesses(total, "st") + narrow_accesses(embedding, "st") == []


@pytest.mark.parametrize("logits", ["*fp32", "*bf16"])
@pytest.mark.parametrize(("draws", "filters"), [(False, False), (True, False), (True, True)])
def test_draw(sm90: Sm90Compiler, draws: bool, filters: bool, logits: str) -> None:
    constants = {"DRAWS": draws, "FILTERS": filters, "TILE": 4096}
    divisible = ["vocab_size", "row_stride"]
    name = PACKAGE + "sampling:draw_kernel"
    resources = sm90.compiled(name, DRAW | {"logits": logits}, constants, 8, 3, divisible=divisible)
    assert_resident(resources, 2)
    assert "cp.async.cg" in resources.ptx
    assert ("lg2.approx.f32" in resources.ptx) == draws


@pytest.mark.parametrize("logits", ["*fp32", "*bf16"])
def test_threshold(sm90: Sm90Compiler, logits: str) -> None:
    divisible = ["vocab_size", "row_stride"]
    name = PACKAGE + "sampling_filter:threshold_kernel"
    resources = sm90.compiled(name, THRESHOLD | {"logits": logits}, FILTERS, 16, 3, divisible=divisible)
    assert_resident(resources, 1)
    assert "cp.async" in resources.ptx


@pytest.mark.parametrize(
    ("kernel", "signature", "ones", "constants"),
    [
        (
            "norm:rms_norm_kernel",
            NORM,
            ("num_rows", "width"),
            {"ADDS": True, "QUANTISES": False, "BLOCK": 1, "STAGES": 1},
        ),
        ("activation:silu_mul_kernel", SILU, ("num_rows", "width"), {"BLOCK": 1, "STAGES": 1}),
        (
            "all_reduce_add:add_partials_kernel",
            ADD,
            ("size", "gap"),
            {"NUM_RANKS": 1, "HAS_RESIDUAL": False, "WIDTH": 1, "BLOCK": 64, "STAGES": 1},
        ),
        (
            "embedding:embedding_kernel",
            EMBEDDING,
            ("first_row", "num_rows", "num_tokens", "width"),
            {"BLOCK": 1, "STAGES": 1},
        ),
        ("quantise:quantise_rows_kernel", QUANTISE, ("num_rows", "width"), {"BLOCK": 1, "STAGES": 1}),
        (
            "sampling:draw_kernel",
            DRAW,
            ("vocab_size", "row_stride", "tiles_per_split"),
            {"DRAWS": True, "FILTERS": True, "TILE": 256},
        ),
        (
            "sampling:merge_kernel",
            {"parts": "*i32", "output": "*i64", "num_splits": "i32"},
            ("num_splits",),
            {"BLOCK": 1},
        ),
        ("sampling_filter:threshold_kernel", THRESHOLD, ("vocab_size", "row_stride"), FILTERS),
    ],
)
def test_sizes_of_one_are_constants_to_the_compiler(
    sm90: Sm90Compiler, kernel: str, signature: dict[str, str], ones: tuple[str, ...], constants: dict[str, object]
) -> None:
    """Triton compiles a kernel anew for an integer that is 1, with a constant in its place."""
    remaining = {name: kind for name, kind in signature.items() if name not in ones}
    assert sm90.compiled(PACKAGE + kernel, remaining, constants | dict.fromkeys(ones, 1), 1, 1).spill_bytes >= 0
