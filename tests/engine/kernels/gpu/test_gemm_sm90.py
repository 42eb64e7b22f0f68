"""What the persistent GEMM takes of an SM in its real configurations, from the compiler's own report."""

import functools

import pytest
import torch

from engine.kernels.gpu.gemm import gemm, persistent_gemm
from engine.kernels.gpu.gemm_config import CANDIDATES, CORESIDENT, GemmConfig
from engine.kernels.gpu.scaled_gemm import scaled_gemm
from tests.engine.kernels.gpu.sm90 import (
    LARGEST_SHARED_BYTES,
    REGISTERS_PER_SM,
    RESERVED_SHARED_BYTES,
    SHARED_BYTES_PER_SM,
    Resources,
    Sm90Compiler,
)

# The guest of `CORESIDENT`: a CTA of decode attention with two stages of a block of 64 keys and values, 16 KiB each.
GUEST_THREADS = 128
GUEST_REGISTERS = 104
GUEST_SHARED_BYTES = 2 * 32 * 1024 + 256  # and barriers
DIVISIBLE = ["num_columns", "num_inner", "output_stride", "residual_stride"]


def arguments(
    rows: int, columns: int, inner: int, *, operand: str = "bf16", extras: tuple[str, ...] = ("residual",)
) -> dict[str, str]:
    """Types of the kernel's run-time arguments, with those of `extras` that may be None given."""
    kinds = {"residual": "*bf16", "bias": "*bf16", "row_scales": "*fp32", "column_scales": "*fp32"}
    return (
        {"a": f"tensordesc<{operand}[{rows},{inner}]>", "b": f"tensordesc<{operand}[{columns},{inner}]>"}
        | {"output": "*bf16"}
        | {name: kinds[name] for name in extras}
        | dict.fromkeys(["num_rows", "num_columns", "num_inner", "output_stride", "residual_stride"], "i32")
    )


def constants(
    rows: int, columns: int, inner: int, parts: int, group: int = 16, extras: tuple[str, ...] = ("residual",)
) -> dict[str, object]:
    sizes = {"ROWS": rows, "COLUMNS": columns, "INNER": inner, "GROUP": group, "PARTS": parts}
    absent = {"residual", "bias", "row_scales", "column_scales"} - set(extras)
    return sizes | dict.fromkeys(absent)


def compiled(
    sm90: Sm90Compiler, config: GemmConfig, operand: str = "bf16", extras: tuple[str, ...] = ("residual",)
) -> Resources:
    inner = config.inner(1 if operand == "fp8e4nv" else 2)
    return sm90.compiled(
        persistent_gemm,
        arguments(config.rows, config.columns, inner, operand=operand, extras=extras),
        constants(config.rows, config.columns, inner, config.epilogue_parts, config.group, extras),
        config.num_warps,
        config.num_stages,
        divisible=DIVISIBLE,
        maxnreg=config.max_registers,
    )


def name(value: GemmConfig | tuple[str, ...]) -> str:
    if isinstance(value, GemmConfig):
        return f"{value.rows}x{value.columns}-{value.num_stages}-stages"
    return "+".join(value) or "plain"


@pytest.mark.slow
@pytest.mark.parametrize("extras", [(), ("residual",), ("bias",), ("bias", "residual")], ids=name)
@pytest.mark.parametrize("config", [*CANDIDATES, CORESIDENT], ids=name)
def test_bfloat16_uses_tensor_cores_and_tma_and_spills_nothing(
    config: GemmConfig, extras: tuple[str, ...], sm90: Sm90Compiler
) -> None:
    resources = compiled(sm90, config, extras=extras)
    print(f"{name(config)}: {resources.registers} registers, {resources.shared_bytes} bytes shared")
    assert resources.spill_bytes == 0
    assert resources.warnings == []
    assert resources.shared_bytes <= LARGEST_SHARED_BYTES
    assert resources.shared_bytes <= config.stage_bytes() + 256  # the epilogue has no memory of its own
    assert f"wgmma.mma_async.sync.aligned.m64n{config.columns}k16.f32.bf16.bf16" in resources.ptx
    assert "cp.async.bulk.tensor.2d" in resources.ptx
    assert "ld.global.b16" not in resources.ptx or "bias" in extras
    assert "st.global.v4" in resources.ptx
    # The products of one stage run while those of the next are issued.
    assert "wgmma.wait_group.sync.aligned 1" in resources.ptx


@pytest.mark.slow
@pytest.mark.parametrize("config", [*CANDIDATES, CORESIDENT], ids=name)
def test_fp8_uses_its_tensor_cores(config: GemmConfig, sm90: Sm90Compiler) -> None:
    resources = compiled(sm90, config, operand="fp8e4nv", extras=("row_scales", "column_scales", "residual"))
    print(f"{name(config)}: {resources.registers} registers, {resources.shared_bytes} bytes shared")
    assert resources.spill_bytes == 0
    assert resources.warnings == []
    assert resources.shared_bytes <= config.stage_bytes() + 256
    assert f"wgmma.mma_async.sync.aligned.m64n{config.columns}k32.f32.e4m3.e4m3" in resources.ptx


@pytest.mark.parametrize("operand", ["bf16", "fp8e4nv"])
def test_coresident_leaves_room_for_one_attention_cta(operand: str, sm90: Sm90Compiler) -> None:
    scales = ("row_scales", "column_scales") if operand == "fp8e4nv" else ()
    resources = compiled(sm90, CORESIDENT, operand, ("bias", "residual", *scales))
    guest_registers = GUEST_REGISTERS * GUEST_THREADS
    assert resources.registers <= 200
    assert resources.shared_bytes <= 147 * 1024
    assert resources.cta_registers + guest_registers <= REGISTERS_PER_SM
    assert resources.shared_bytes + GUEST_SHARED_BYTES + 2 * RESERVED_SHARED_BYTES <= SHARED_BYTES_PER_SM
    # And the candidate that is faster alone leaves none: there would be nothing to choose otherwise.
    alone = compiled(sm90, CANDIDATES[0], operand, ("bias", "residual", *scales))
    assert alone.shared_bytes + GUEST_SHARED_BYTES + 2 * RESERVED_SHARED_BYTES > SHARED_BYTES_PER_SM


def launch_variants() -> None:
    """Every combination of arguments that makes another signature."""
    half = functools.partial(torch.empty, dtype=torch.bfloat16)
    a_TK, b_NK = half(256, 512), half(1024, 512)
    gemm(a_TK, b_NK, num_sms=132)
    gemm(a_TK, b_NK, num_sms=132, config=CORESIDENT, residual_TN=half(256, 1024), bias_N=half(1024))
    gemm(a_TK[:1], b_NK, num_sms=132)
    gemm(a_TK[:17], b_NK[:1000], num_sms=3, output=torch.empty(17, 1000))
    eighth = functools.partial(torch.empty, dtype=torch.float8_e4m3fn)
    scaled_gemm(
        eighth(256, 512),
        torch.empty(256),
        eighth(1024, 512),
        torch.empty(1024),
        num_sms=92,
        residual_TN=half(256, 1024),
    )


def test_launches_compile_as_they_are_made(sm90: Sm90Compiler) -> None:
    launches = sm90.launches(launch_variants)
    assert [launch.kernel for launch in launches] == ["persistent_gemm"] * 5
    assert launches[1].grid == (8,)
    assert launches[3].grid == (3,)
    assert all(launch.resources.spill_bytes == 0 for launch in launches)
    assert all("wgmma.mma_async" in launch.resources.ptx for launch in launches)
    assert launches[1].resources.registers <= 200
