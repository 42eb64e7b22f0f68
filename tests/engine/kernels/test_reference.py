"""The reference kernels against attention written out token by token in float64."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.kernels import reference

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
HEAD_DIM = 16


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedContext:
    """Sequences of known keys and values [n, K, d], and the same in a cache of shuffled blocks."""

    keys: list[Tensor]
    values: list[Tensor]
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor


def paged_context(
    lengths: tuple[int, ...], num_kv_heads: int, block_size: int, dtype: torch.dtype, device: str, stale: float = 7.0
) -> PagedContext:
    """Write random sequences through `write_kv` into a cache full of `stale` numbers, as freed blocks leave it."""
    generator = torch.Generator().manual_seed(0)
    width = max(-(-length // block_size) for length in lengths)
    num_blocks = len(lengths) * width + 3
    shape = (num_blocks, num_kv_heads, block_size, HEAD_DIM)
    key_cache, value_cache = (torch.full(shape, stale, dtype=dtype, device=device) for _ in range(2))
    blocks = torch.randperm(num_blocks, generator=generator)[: len(lengths) * width]
    tables = blocks.view(len(lengths), width)
    keys, values = [], []
    for table, length in zip(tables, lengths, strict=True):
        key, value = (
            torch.randn(length, num_kv_heads, HEAD_DIM, generator=generator).to(device, dtype) for _ in range(2)
        )
        positions = torch.arange(length)
        slots = table[positions // block_size] * block_size + positions % block_size
        reference.write_kv(key, value, slots.to(device), key_cache, value_cache)
        keys.append(key)
        values.append(value)
    return PagedContext(
        keys=keys, values=values, key_cache=key_cache, value_cache=value_cache, block_tables=tables.to(device)
    )


def attend(query_Hd: Tensor, key_LKd: Tensor, value_LKd: Tensor, position: int, window: int | None) -> Tensor:
    """One token's attention as the formula says: softmax(q . k / sqrt(d)) over the positions it may see."""
    group = query_Hd.shape[0] // key_LKd.shape[1]
    first = 0 if window is None else max(0, position - window + 1)
    key_LHd = key_LKd[first : position + 1].double().repeat_interleave(group, 1)
    value_LHd = value_LKd[first : position + 1].double().repeat_interleave(group, 1)
    scores_HL = torch.einsum("hd,lhd->hl", query_Hd.double(), key_LHd) / math.sqrt(HEAD_DIM)
    return torch.einsum("hl,lhd->hd", scores_HL.softmax(-1), value_LHd)


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def check_close(actual: Tensor, expected: list[Tensor], dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), torch.stack(expected), atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 1, 5, 16, 1000])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize("lengths", [(1,), (1, 8, 9, 40, 7, 16, 3), (300, 2, 299, 17), tuple(range(1, 40))])
def test_decode(
    lengths: tuple[int, ...], num_heads: int, num_kv_heads: int, window: int | None, dtype: torch.dtype, device: str
) -> None:
    context = paged_context(lengths, num_kv_heads, 8, dtype, device)
    query = torch.randn(len(lengths), num_heads, HEAD_DIM, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    output = reference.decode_attention(
        query,
        context.key_cache,
        context.value_cache,
        context.block_tables,
        torch.tensor(lengths, device=device),
        max(lengths),
        HEAD_DIM**-0.5,
        window,
    )
    expected = [
        attend(query[index], context.keys[index], context.values[index], length - 1, window)
        for index, length in enumerate(lengths)
    ]
    check_close(output, expected, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 1, 6, 1000])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize(
    ("chunk_sizes", "context_lengths"),
    [
        ((1,), (1,)),
        ((1,), (17,)),
        ((8, 8, 8), (8, 16, 24)),
        ((7, 1, 20, 13), (7, 9, 33, 13)),
        ((5,) * 9, (5,) * 9),
        ((5,) * 9, tuple(range(5, 14))),
        ((40, 3), (41, 200)),
    ],
)
def test_prefill(
    chunk_sizes: tuple[int, ...],
    context_lengths: tuple[int, ...],
    num_heads: int,
    num_kv_heads: int,
    window: int | None,
    dtype: torch.dtype,
    device: str,
) -> None:
    context = paged_context(context_lengths, num_kv_heads, 8, dtype, device)
    query = torch.randn(sum(chunk_sizes), num_heads, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    query = query.to(device, dtype)
    output = reference.prefill_attention(
        query,
        context.key_cache,
        context.value_cache,
        context.block_tables,
        chunk_sizes,
        context_lengths,
        HEAD_DIM**-0.5,
        window,
    )
    places = [
        (index, position)
        for index, (size, length) in enumerate(zip(chunk_sizes, context_lengths, strict=True))
        for position in range(length - size, length)
    ]
    expected = [
        attend(query[token], context.keys[index], context.values[index], position, window)
        for token, (index, position) in enumerate(places)
    ]
    check_close(output, expected, dtype)


def test_no_prefill_tokens_give_an_empty_output() -> None:
    cache = torch.zeros(2, 1, 4, HEAD_DIM)
    query = torch.zeros(0, 2, HEAD_DIM)
    tables = torch.zeros(0, 1, dtype=torch.int64)
    assert reference.prefill_attention(query, cache, cache, tables, (), (), 1.0, None).shape == (0, 2, HEAD_DIM)


def test_write_kv_touches_only_its_slots() -> None:
    keys, values = torch.zeros(3, 2, 4, HEAD_DIM), torch.zeros(3, 2, 4, HEAD_DIM)
    key, value = torch.randn(3, 2, HEAD_DIM), torch.randn(3, 2, HEAD_DIM)
    slots = torch.tensor([11, 0, 6])
    reference.write_kv(key, value, slots, keys, values)
    for token, slot in enumerate(slots.tolist()):
        assert torch.equal(keys[slot // 4, :, slot % 4], key[token])
        assert torch.equal(values[slot // 4, :, slot % 4], value[token])
    assert int((keys != 0).any(-1).sum()) == int((values != 0).any(-1).sum()) == 3 * 2


def test_what_lies_beyond_a_sequence_does_not_matter() -> None:
    """Freed blocks hold numbers of other requests; no bit of an output may depend on them."""
    outputs = []
    for stale in (0.0, 1e30):
        context = paged_context((9, 30, 2), 2, 8, torch.float32, "cpu", stale=stale)
        query = torch.randn(3, 4, HEAD_DIM, generator=torch.Generator().manual_seed(1))
        arguments = (query, context.key_cache, context.value_cache, context.block_tables)
        outputs.append(reference.decode_attention(*arguments, torch.tensor([9, 30, 2]), 30, 0.25, None))
        outputs.append(reference.prefill_attention(*arguments, (1, 1, 1), (9, 30, 2), 0.25, 5))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_overflowed_stay_in_their_request(dtype: torch.dtype) -> None:
    """A request that overflowed leaves its blocks to another one, whose masked positions they become."""
    keys, values = (torch.zeros(2, 1, 8, HEAD_DIM, dtype=dtype) for _ in range(2))
    broken = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max] * 4, dtype=dtype)
    reference.write_kv(broken.expand(16, 1, -1), broken.roll(1).expand(16, 1, -1), torch.arange(16), keys, values)
    key, value = (torch.randn(9, 1, HEAD_DIM).to(dtype) for _ in range(2))
    reference.write_kv(key, value, torch.arange(9), keys, values)
    query = torch.randn(2, 2, HEAD_DIM).to(dtype)
    tables, lengths = torch.tensor([[0, 1], [0, 1]]), torch.tensor([9, 3])
    decoded = reference.decode_attention(query, keys, values, tables, lengths, 9, 0.25, None)
    prefilled = reference.prefill_attention(query, keys, values, tables[:1], (2,), (9,), 0.25, None)
    assert bool(decoded.isfinite().all()) and bool(prefilled.isfinite().all())
    assert float(decoded.abs().max()) < 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_decode_does_not_synchronise_with_the_device() -> None:
    context = paged_context((9, 30, 2), 2, 8, torch.float32, "cuda")
    query = torch.randn(3, 4, HEAD_DIM, device="cuda")
    lengths = torch.tensor([9, 30, 2], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        reference.decode_attention(
            query, context.key_cache, context.value_cache, context.block_tables, lengths, 30, 0.25, None
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
