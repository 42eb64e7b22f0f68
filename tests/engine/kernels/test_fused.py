"""The functions that are compiled, as they are written, against the operations that they stand for."""

import pytest
import torch

from engine.kernels import fused, reference
from tests.engine.kernels.test_reference import HEAD_DIM, paged_context

LENGTHS = (1, 4, 5, 23, 64)
NUM_KV_HEADS, BLOCK_SIZE = 2, 4


@pytest.mark.parametrize("group_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_decode_attention_is_the_reference_s(dtype: torch.dtype, group_size: int) -> None:
    context = paged_context(LENGTHS, NUM_KV_HEADS, BLOCK_SIZE, dtype, "cpu", stale=1e30)
    query_DHd = torch.randn(len(LENGTHS), NUM_KV_HEADS * group_size, HEAD_DIM, dtype=torch.float64).to(dtype)
    lengths_D = torch.tensor(LENGTHS)
    inputs = (query_DHd, context.key_cache, context.value_cache, context.block_tables, lengths_D)
    expected = reference.decode_attention(*inputs, max(LENGTHS), 0.3, None)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(fused.decode_attention(*inputs, scale=0.3), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("is_normalised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_are_rotated_and_keys_written_as_by_separate_operations(
    dtype: torch.dtype, is_normalised: bool
) -> None:
    num_tokens, num_heads, num_blocks = 9, 6, 7
    qkv_TF = torch.randn(num_tokens, (num_heads + 2 * NUM_KV_HEADS) * HEAD_DIM).to(dtype)
    qkv_TF[3] = float("inf")
    positions_T = torch.randint(0, 50, (num_tokens,))
    slots_T = torch.randperm(num_blocks * BLOCK_SIZE)[:num_tokens]
    table_Md = torch.randn(50, HEAD_DIM)
    weights = [torch.randn(HEAD_DIM).to(dtype) for _ in range(2)]
    caches = [torch.full((num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM), 5.0, dtype=dtype) for _ in range(4)]

    heads_TNd = qkv_TF.view(num_tokens, -1, HEAD_DIM)
    query, key, value = heads_TNd.split_with_sizes([num_heads, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
    if is_normalised:
        query, key = (
            fused.rms_norm(each, weight, epsilon=1e-5) for each, weight in zip((query, key), weights, strict=True)
        )
    angles = table_Md[positions_T][:, None].chunk(2, dim=-1)
    reference.write_kv(fused.rotate(key, *angles), value, slots_T, caches[0], caches[1])

    inputs = (qkv_TF, positions_T, slots_T, *caches[2:], table_Md)
    rotated = (
        fused.normalise_rotate_and_write(*inputs, *weights, epsilon=1e-5)
        if is_normalised
        else fused.rotate_and_write(*inputs)
    )
    torch.testing.assert_close(rotated, fused.rotate(query, *angles), equal_nan=True, rtol=0, atol=0)
    assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])
    assert all(cache.isfinite().all() for cache in caches)
