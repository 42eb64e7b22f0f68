"""Fused heads split, normalised, rotated and cached, against the layer's functions."""

import itertools

import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels import fused, reference
from engine.kernels.gpu.rotary import rotate_and_write, tokens_of_a_program, warps_of_a_program

EPSILON = 1e-5
NUM_BLOCKS, NUM_POSITIONS = 5, 50


def given_inputs(
    device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, num_tokens: int = 5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fused heads, positions and the table of angles; and slots at the borders of blocks."""
    qkv_TF = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype).to(device)
    angles = torch.outer(torch.arange(NUM_POSITIONS).float(), torch.rand(head_dim // 2))
    table_Md = torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)
    slots_T = torch.tensor([15, 16, 79, 0, 31])[:num_tokens].to(device)
    return qkv_TF, torch.randint(0, NUM_POSITIONS, (num_tokens,), device=device), slots_T, table_Md


def empty_caches(
    num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, block_size: int = 16
) -> tuple[Tensor, Tensor]:
    """Two caches full of sevens."""
    shape = (NUM_BLOCKS, num_kv_heads, block_size, head_dim)
    return torch.full(shape, 7.0, device=device).to(dtype), torch.full(shape, 7.0, device=device).to(dtype)


@pytest.mark.parametrize("is_normalised", [False, True])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(4, 4, 64), (8, 2, 128), (8, 1, 64), (7, 1, 16), (6, 3, 32)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_heads_are_rotated_and_cached_as_by_the_layer(
    device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, is_normalised: bool
) -> None:
    qkv_TF, positions_T, slots_T, table_Md = given_inputs(device, dtype, num_heads, num_kv_heads, head_dim)
    weights = [torch.randn(head_dim).to(dtype).to(device) for _ in range(2)] if is_normalised else []
    expected_caches = empty_caches(num_kv_heads, head_dim, dtype, device)
    inputs = (qkv_TF, positions_T, slots_T, *expected_caches, table_Md)
    expected = (
        fused.normalise_rotate_and_write(*inputs, *weights, epsilon=EPSILON)
        if weights
        else fused.rotate_and_write(*inputs)
    )
    caches = empty_caches(num_kv_heads, head_dim, dtype, device)
    q_weight, k_weight = weights if weights else (None, None)
    query_THd = rotate_and_write(
        qkv_TF,
        positions_T,
        slots_T,
        *caches,
        table_Md,
        num_heads=num_heads,
        q_weight=q_weight,
        k_weight=k_weight,
        epsilon=EPSILON,
    )
    step = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(query_THd, expected, rtol=2 * step, atol=2 * step)
    torch.testing.assert_close(caches[0], expected_caches[0], rtol=2 * step, atol=2 * step)
    assert torch.equal(caches[1], expected_caches[1])
    if not is_normalised and dtype is not torch.float32:
        assert bool((query_THd == expected).float().mean() > 0.99)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_padded_tokens_write_nothing_and_stay_finite(device: torch.device, index_dtype: torch.dtype) -> None:
    qkv_TF, positions_T, slots_T, table_Md = given_inputs(device, torch.bfloat16, 8, 2, 64)
    slots_T[1], slots_T[2], slots_T[4] = -1, NUM_BLOCKS * 16, 2**31 - 1
    positions_T[1], positions_T[2] = -1, NUM_POSITIONS
    caches, expected = (empty_caches(2, 64, torch.bfloat16, device) for _ in range(2))
    query_THd = rotate_and_write(
        qkv_TF, positions_T.to(index_dtype), slots_T.to(index_dtype), *caches, table_Md, num_heads=8
    )
    kept = [0, 3]
    fused.rotate_and_write(qkv_TF[kept], positions_T[kept], slots_T[kept], *expected, table_Md)
    for cache, other in zip(caches, expected, strict=True):
        torch.testing.assert_close(cache, other, rtol=2**-7, atol=2**-7)
    assert not query_THd[1:3].any()
    assert bool(query_THd.isfinite().all())
    nobody_T = positions_T[:0]
    assert len(rotate_and_write(qkv_TF[:0], nobody_T, nobody_T, *caches, table_Md, num_heads=8)) == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy reports overflows
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn])
def test_what_is_no_finite_number_is_cached_as_one(device: torch.device, stored: torch.dtype) -> None:
    qkv_TF, positions_T, slots_T, table_Md = given_inputs(device, torch.float32, 2, 1, 16)
    qkv_TF[0], qkv_TF[1], qkv_TF[2] = float("nan"), float("inf"), -1e38
    caches = empty_caches(1, 16, stored, device)
    rotate_and_write(qkv_TF, positions_T, slots_T, *caches, table_Md, num_heads=2)
    assert all(bool(cache.float().isfinite().all()) for cache in caches)
    largest = min(reference.LARGEST_CACHED, torch.finfo(stored).max)
    assert caches[1][0, 0, 15].float().tolist() == [0.0] * 16
    assert caches[1][1, 0, 0].float().tolist() == [largest] * 16
    assert caches[1][4, 0, 15].float().tolist() == [-largest] * 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_e4m3_caches_hold_what_is_left_after_the_scale(device: torch.device, dtype: torch.dtype) -> None:
    qkv_TF, positions_T, slots_T, table_Md = given_inputs(device, dtype, 8, 2, 64)
    wide = empty_caches(2, 64, dtype, device)
    rotate_and_write(qkv_TF, positions_T, slots_T, *wide, table_Md, num_heads=8)
    caches = empty_caches(2, 64, torch.float8_e4m3fn, device)
    scales = 0.03, 0.002
    rotate_and_write(
        qkv_TF, positions_T, slots_T, *caches, table_Md, num_heads=8, key_scale=scales[0], value_scale=scales[1]
    )
    for slot, (cache, full, scale) in itertools.product(slots_T.tolist(), zip(caches, wide, scales, strict=True)):
        given, expected = cache[slot // 16, :, slot % 16], full[slot // 16, :, slot % 16].float() / scale
        assert torch.equal(given.float(), expected.clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_the_grid_does_not_matter(device: torch.device) -> None:
    qkv_TF, positions_T, slots_T, table_Md = given_inputs(device, torch.bfloat16, 32, 8, 128)
    results = []
    for num_ctas in (None, 1, 2):
        caches = empty_caches(8, 128, torch.bfloat16, device)
        query_THd = torch.empty(5, 32, 128, dtype=torch.bfloat16, device=device)
        rotate_and_write(
            qkv_TF, positions_T, slots_T, *caches, table_Md, num_heads=32, query_THd=query_THd, num_ctas=num_ctas
        )
        results.append((query_THd, *caches))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_programs_of_common_shapes() -> None:
    shapes = {
        (32, 128): (1, 2),
        (64, 128): (1, 4),
        (4, 128): (8, 2),
        (28, 128): (1, 2),
        (32, 64): (2, 2),
        (1, 64): (64, 2),
    }
    assert {shape: (tokens_of_a_program(*shape), warps_of_a_program(*shape)) for shape in shapes} == shapes


def test_wrong_arguments_are_named(device: torch.device) -> None:
    qkv_TF, positions_T, slots_T, table_Md = given_inputs(device, torch.float32, 8, 2, 64)
    caches = empty_caches(2, 64, torch.float32, device)
    with pytest.raises(ConfigError, match=r"qkv_TF has shape \(5, 768\), where \(5, 704\) is right"):
        rotate_and_write(qkv_TF, positions_T, slots_T, *caches, table_Md, num_heads=7)
    with pytest.raises(ConfigError, match=r"slots_T is torch.float32"):
        rotate_and_write(qkv_TF, positions_T, slots_T.float(), *caches, table_Md, num_heads=8)
    with pytest.raises(ConfigError, match=r"Only one of q_weight and k_weight"):
        rotate_and_write(qkv_TF, positions_T, slots_T, *caches, table_Md, num_heads=8, q_weight=table_Md[0])
