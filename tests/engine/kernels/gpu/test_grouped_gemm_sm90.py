"""What the kernels of a mixture of experts take of an SM, at Mixtral's and Qwen3-MoE's numbers of experts."""

import functools

import pytest
import torch

from engine.kernels.gpu import expert_routing, grouped_gemm, mixture_of_experts
from engine.kernels.gpu.gemm_config import GemmConfig
from engine.kernels.gpu.grouped_gemm_config import GATED_CANDIDATES, PLAIN_CANDIDATES
from tests.engine.kernels.gpu.sm90 import LARGEST_SHARED_BYTES, Resources, Sm90Compiler

DIVISIBLE = ["num_columns", "num_inner", "a_stride", "output_stride"]
MIXTRAL = (8, 2)
QWEN3_MOE = (128, 8)


def name(value: object) -> str:
    return f"{value.rows}x{value.columns}" if isinstance(value, GemmConfig) else str(value)


def compiled(sm90: Sm90Compiler, config: GemmConfig, is_gated: bool, num_experts: int, num_choices: int) -> Resources:
    inner = config.inner(2)
    signature = {
        "a": "*bf16" if is_gated else f"tensordesc<bf16[{config.rows},{inner}]>",
        "b": f"tensordesc<bf16[{config.columns},{inner}]>",
        "output": "*bf16",
        "order": "*i32",
        "starts": "*i32",
    }
    constants = {
        "NUM_EXPERTS": num_experts,
        "NUM_CHOICES": num_choices,
        "GATED": is_gated,
        "EXPERTS": max(16, num_experts),
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "INNER": inner,
        "GROUP": config.group,
        "PARTS": config.epilogue_parts,
    }
    resources = sm90.compiled(
        grouped_gemm.grouped_gemm_kernel,
        signature | dict.fromkeys(["num_columns", "num_inner", "a_stride", "output_stride"], "i32"),
        constants,
        config.num_warps,
        config.num_stages,
        divisible=DIVISIBLE,
        maxnreg=config.max_registers,
    )
    print(f"{name(config)} {num_experts}: {resources.registers} registers, {resources.shared_bytes} bytes shared")
    return resources


def assert_lean(resources: Resources) -> None:
    assert resources.spill_bytes == 0
    assert resources.warnings == []
    assert resources.shared_bytes <= LARGEST_SHARED_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("experts", [MIXTRAL, QWEN3_MOE], ids=name)
@pytest.mark.parametrize("config", GATED_CANDIDATES, ids=name)
def test_gated_gathers_rows_in_16_bytes_and_weights_by_tma(
    config: GemmConfig, experts: tuple[int, int], sm90: Sm90Compiler
) -> None:
    resources = compiled(sm90, config, True, *experts)
    assert_lean(resources)
    assert f"wgmma.mma_async.sync.aligned.m64n{config.columns}k16.f32.bf16.bf16" in resources.ptx
    assert "cp.async.cg.shared.global" in resources.ptx
    assert "cp.async.ca.shared.global" not in resources.ptx  # narrower than 16 bytes
    assert "cp.async.bulk.tensor.2d" in resources.ptx
    assert "st.global.v4" in resources.ptx


@pytest.mark.slow
@pytest.mark.parametrize("experts", [MIXTRAL, QWEN3_MOE], ids=name)
@pytest.mark.parametrize("config", PLAIN_CANDIDATES, ids=name)
def test_scattered_loads_everything_by_tma(config: GemmConfig, experts: tuple[int, int], sm90: Sm90Compiler) -> None:
    resources = compiled(sm90, config, False, *experts)
    assert_lean(resources)
    assert f"wgmma.mma_async.sync.aligned.m64n{config.columns}k16.f32.bf16.bf16" in resources.ptx
    assert "cp.async.cg.shared.global" not in resources.ptx
    assert "cp.async.bulk.tensor.2d" in resources.ptx
    assert "st.global.v4" in resources.ptx


@pytest.mark.parametrize("experts", [MIXTRAL, QWEN3_MOE], ids=name)
def test_routing_and_the_sum_of_copies_spill_nothing(experts: tuple[int, int], sm90: Sm90Compiler) -> None:
    num_experts, num_choices = experts
    tokens, block = min(32, 2048 // max(16, num_experts)), max(16, num_experts)
    sizes = {"NUM_EXPERTS": num_experts, "NUM_CHOICES": num_choices, "TOKENS": tokens, "EXPERTS": block}
    picking = sm90.compiled(
        expert_routing._pick_experts,
        {"logits": "*bf16", "scores": "*bf16", "experts": "*i32", "counts": "*i32", "positions": "*i64"}
        | {"num_rows": "i32", "logits_stride": "i32"},
        sizes | {"NORMALISE": True, "CHOICES": num_choices},
        4,
        3,
        divisible=["logits_stride"],
    )
    placing = sm90.compiled(
        expert_routing._place_copies,
        {
            "experts": "*i32",
            "counts": "*i32",
            "order": "*i32",
            "starts": "*i32",
            "num_rows": "i32",
            "num_blocks": "i32",
        },
        sizes | {"BLOCKS": tokens},
        4,
        3,
    )
    summing = sm90.compiled(
        mixture_of_experts._sum_copies,
        {"copies": "*bf16", "scores": "*fp32", "experts": "*i32", "output": "*bf16", "width": "i32"},
        {"NUM_CHOICES": num_choices, "ROUNDS": False, "COLUMNS": 1024},
        4,
        3,
        divisible=["width"],
    )
    for resources in (picking, placing, summing):
        print(f"{num_experts}: {resources.registers} registers, {resources.shared_bytes} bytes shared")
        assert_lean(resources)
    assert "ld.global.v4" in summing.ptx
    assert "st.global.v4" in summing.ptx


def launch_variants() -> None:
    half = functools.partial(torch.empty, dtype=torch.bfloat16)
    for num_experts, num_choices in (MIXTRAL, QWEN3_MOE):
        mixture_of_experts.mixture_of_experts(
            half(256, 512),
            half(256, num_experts),
            half(num_experts, 2 * 384, 512),
            half(num_experts, 512, 384),
            num_choices,
            normalise=True,
            round_scores=True,
            num_sms=132,
            positions_T=torch.empty(256, dtype=torch.int64),
        )


@pytest.mark.slow
def test_launches_compile_as_they_are_made(sm90: Sm90Compiler) -> None:
    launches = sm90.launches(launch_variants)
    gemms = [launch for launch in launches if launch.kernel == "grouped_gemm_kernel"]
    assert len(launches) == 2 * 5
    assert [launch.grid for launch in gemms] == [(132,)] * 4
    assert all("wgmma.mma_async" in launch.resources.ptx for launch in gemms)
    assert all(launch.resources.spill_bytes == 0 for launch in launches)
