"""Prefill attention by products against its readable twin, `reference.prefill_attention`."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engine.kernels import prefill, reference
from engine.kernels.prefill import PrefillPlan

HEAD_DIM = 16
# Of outputs around one: sums in another order, and in bfloat16 weights of 8 bits and two roundings of the result.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
CHUNKS = {
    "one token": ((1,), (17,)),
    "equal prompts": ((40,) * 9, (40,) * 9),
    "ragged prompts": ((70, 3, 64, 65, 130, 7, 66), (70, 3, 64, 65, 130, 7, 66)),
    "cached prefixes": ((20, 20, 33, 1, 20), (50, 84, 41, 150, 50)),
    "long chunk": ((300, 5), (1100, 200)),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def paged(
    chunk_sizes: tuple[int, ...],
    lengths: tuple[int, ...],
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, key and value cache, block tables."""
    generator = torch.Generator().manual_seed(0)
    width = -(-max(lengths) // block_size)
    shape = (len(lengths) * width + 2, num_kv_heads, block_size, HEAD_DIM)
    keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    tables = torch.randperm(shape[0], generator=generator)[: len(lengths) * width].view(len(lengths), width)
    query = torch.randn(sum(chunk_sizes), num_heads, HEAD_DIM, generator=generator).to(dtype)
    return query, keys, values, tables


def attended(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    sizes: tuple[int, ...],
    lengths: tuple[int, ...],
    window: int | None,
) -> Tensor:
    query, keys, values, tables = inputs
    plan = PrefillPlan.of(
        tables,
        sizes,
        lengths,
        num_kv_heads=keys.shape[1],
        num_heads=query.shape[1],
        block_size=keys.shape[2],
        window=window,
    )
    return prefill.prefill_attention(query, keys, values, plan, scale=0.3, window=window)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 1, 37, 5000])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "block_size"), [(4, 4, 16), (8, 2, 64), (3, 1, 8)])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_equals_the_reference(
    chunks: str, num_heads: int, num_kv_heads: int, block_size: int, window: int | None, dtype: torch.dtype
) -> None:
    sizes, lengths = CHUNKS[chunks]
    inputs = paged(sizes, lengths, num_heads, num_kv_heads, block_size, dtype)
    expected = reference.prefill_attention(*inputs, sizes, lengths, 0.3, window)
    output = attended(inputs, sizes, lengths, window)
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("window", [None, 37])
def test_little_room_changes_nothing(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk by itself, and every KV head."""
    sizes, lengths = CHUNKS["ragged prompts"]
    inputs = paged(sizes, lengths, 8, 2, 16, torch.float32)
    expected = attended(inputs, sizes, lengths, window)
    monkeypatch.setattr(prefill, "_LARGEST_BYTES", 1)
    torch.testing.assert_close(attended(inputs, sizes, lengths, window), expected, atol=3e-6, rtol=0)


def test_scores_of_bfloat16_keep_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large scores, as attention sinks have: rounded to 8 bits, their weights would be wrong by tens of percent."""
    sizes, lengths = (64,), (64,)
    query, keys, values, tables = paged(sizes, lengths, 2, 2, 16, torch.bfloat16)
    inputs = (query * 20, keys, values, tables)
    exact = inputs[0].double(), keys.double(), values.double(), tables
    expected = reference.prefill_attention(*exact, sizes, lengths, 0.3, None)
    torch.testing.assert_close(attended(inputs, sizes, lengths, None).double(), expected, atol=3e-2, rtol=0)


def test_the_precision_of_products_is_as_before() -> None:
    sizes, lengths = CHUNKS["equal prompts"]
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    attended(paged(sizes, lengths, 4, 2, 16, torch.bfloat16), sizes, lengths, None)
    assert settings.fp32_precision == before


def test_what_lies_beyond_a_sequence_does_not_matter() -> None:
    """Padding reads blocks and keys of others."""
    sizes, lengths = (20, 3, 22), (50, 49, 22)
    query, keys, values, tables = paged(sizes, lengths, 4, 2, 16, torch.float32)
    outputs = []
    for stale in (0.0, 1e30):
        for row, length in zip(tables, lengths, strict=True):
            num_full, rest = divmod(length, 16)
            keys[row[num_full:], :, rest:], values[row[num_full:], :, rest:] = stale, stale
            keys[row[num_full + 1 :]], values[row[num_full + 1 :]] = stale, stale
        outputs.append(attended((query, keys, values, tables), sizes, lengths, None))
    assert torch.equal(*outputs)


def test_similar_chunks_are_attended_together() -> None:
    sizes = (60, 64, 300, 62)
    *_, tables = paged(sizes, sizes, 4, 2, 16, torch.float32)
    plan = PrefillPlan.of(tables, sizes, sizes, num_kv_heads=2, num_heads=4, block_size=16, window=None)
    shapes = [tuple(group.rows.shape) for group in plan.groups]
    assert sum(num_units for num_units, _ in shapes) == 2 * (3 + 5)
    assert (2 * 4, 64) in shapes, "three prompts and the first tile of the fourth, for two KV heads"
