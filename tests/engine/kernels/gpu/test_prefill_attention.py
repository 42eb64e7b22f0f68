"""Prefill attention on the device against plain attention in float64."""

import math
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels import reference
from engine.kernels.gpu.prefill_attention import prefill_attention, prefill_flops
from engine.kernels.gpu.prefill_config import PrefillConfig, packed_heads, prefill_config
from tests.engine.kernels.gpu.paged_cache import TOLERANCE, PagedCache

SCALE = 0.2
# Few rows and keys, so that small inputs have several tiles.
SMALL = PrefillConfig(rows=32, tile=32, num_warps=4, num_stages=2)


def expected(
    query: Tensor,
    cache: PagedCache,
    sizes: tuple[int, ...],
    window: int | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> Tensor:
    """The reference's answer in float64; zeros behind the last chunk."""
    lengths = cache.lengths.tolist()
    kept = [index for index, size in enumerate(sizes) if size > 0]
    result = torch.zeros(query.shape, dtype=torch.float64)
    if kept:
        result[: sum(sizes)] = reference.prefill_attention(
            query[: sum(sizes)].cpu().double(),
            *cache.plain(key_scale, value_scale),
            cache.block_tables.cpu().long()[kept],
            tuple(sizes[index] for index in kept),
            tuple(lengths[index] for index in kept),
            SCALE,
            window,
        )
    return result


def starts_of(sizes: tuple[int, ...], cache: PagedCache) -> Tensor:
    return torch.tensor([0, *accumulate(sizes)], dtype=cache.lengths.dtype, device=cache.lengths.device)


def check(actual: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual.cpu().double(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("dtype", "group_size", "head_dim", "block_size", "config"),
    [
        (torch.float32, 1, 64, 16, None),
        (torch.float32, 4, 128, 64, SMALL),
        (torch.bfloat16, 4, 128, 64, None),
        (torch.bfloat16, 4, 128, 64, SMALL),
        (torch.bfloat16, 8, 64, 128, None),
        (torch.bfloat16, 3, 96, 32, SMALL),
        (torch.float16, 2, 256, 16, None),
    ],
)
def test_chunks_of_all_kinds(
    dtype: torch.dtype,
    group_size: int,
    head_dim: int,
    block_size: int,
    config: PrefillConfig | None,
    device: torch.device,
) -> None:
    """Whole prompts, ends of long contexts, single tokens, empty chunks, and padding behind the last."""
    lengths, sizes = (40, 150, 0, 64, 129, 7, 65), (40, 17, 0, 64, 1, 0, 33)
    cache = PagedCache.random(
        lengths, num_kv_heads=2, block_size=block_size, head_dim=head_dim, dtype=dtype, device=device
    )
    query = torch.randn(sum(sizes) + 9, 2 * group_size, head_dim).to(device, dtype)
    output = prefill_attention(
        query,
        cache.keys,
        cache.values,
        cache.block_tables,
        starts_of(sizes, cache),
        cache.lengths,
        scale=SCALE,
        config=config,
    )
    assert output.dtype == dtype
    assert not output[sum(sizes) :].any()
    check(output, expected(query, cache, sizes), dtype)


@pytest.mark.parametrize("num_ctas", [1, 5])
def test_a_limited_number_of_programs_computes_the_same_bits(num_ctas: int, device: torch.device) -> None:
    lengths, sizes = (20, 70, 0, 7), (20, 17, 0, 0)
    cache = PagedCache.random(lengths, num_kv_heads=2, block_size=16, head_dim=16, dtype=torch.float32, device=device)
    query = torch.randn(sum(sizes) + 9, 4, 16, device=device)
    whole, limited = (
        prefill_attention(
            query,
            cache.keys,
            cache.values,
            cache.block_tables,
            starts_of(sizes, cache),
            cache.lengths,
            scale=SCALE,
            num_ctas=count,
        )
        for count in (None, num_ctas)
    )
    assert torch.equal(whole, limited)


@pytest.mark.parametrize("num_others", [1, 31, 32, 33, 100])
def test_rows_before_the_first_chunk_are_left_alone(num_others: int, device: torch.device) -> None:
    """Rows of decodes, fewer and more than a tile of queries; and where there is no chunk, only padding follows."""
    lengths, sizes = (40, 70, 9), (40, 3, 0)
    cache = PagedCache.random(lengths, num_kv_heads=2, block_size=16, head_dim=64, dtype=torch.float32, device=device)
    query = torch.randn(num_others + sum(sizes) + 5, 4, 64, device=device)
    for is_empty in (False, True):
        output = torch.full_like(query, 7.0)
        prefill_attention(
            query,
            cache.keys,
            cache.values,
            cache.block_tables,
            starts_of((0, 0, 0) if is_empty else sizes, cache) + num_others,
            cache.lengths,
            scale=SCALE,
            output=output,
            config=SMALL,
        )
        assert bool((output[:num_others] == 7).all())
        wanted = (
            torch.zeros(query.shape, dtype=torch.float64) if is_empty else expected(query[num_others:], cache, sizes)
        )
        check(output[num_others:], wanted[-len(query) + num_others :], torch.float32)


@pytest.mark.parametrize("window", [1, 5, 31, 32, 33, 64, 100, 1000])
def test_window(window: int, device: torch.device) -> None:
    lengths, sizes = (100, 130, 33), (100, 20, 33)
    cache = PagedCache.random(
        lengths,
        num_kv_heads=1,
        block_size=16,
        head_dim=64,
        dtype=torch.float32,
        device=device,
        index_dtype=torch.int64,
    )
    query = torch.randn(sum(sizes), 2, 64, device=device)
    output = prefill_attention(
        query,
        cache.keys,
        cache.values,
        cache.block_tables,
        starts_of(sizes, cache),
        cache.lengths,
        scale=SCALE,
        window=window,
        config=SMALL,
    )
    check(output, expected(query, cache, sizes, window), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_fp8_cache_is_its_numbers_times_their_scales(dtype: torch.dtype, device: torch.device) -> None:
    cache = PagedCache.random(
        (70, 40), num_kv_heads=2, block_size=64, head_dim=64, dtype=torch.float8_e4m3fn, device=device
    )
    sizes = (70, 3)
    query = torch.randn(73, 8, 64).to(device, dtype)
    output = prefill_attention(
        query,
        cache.keys,
        cache.values,
        cache.block_tables,
        starts_of(sizes, cache),
        cache.lengths,
        scale=SCALE,
        key_scale=0.5,
        value_scale=3.0,
    )
    wanted = expected(query, cache, sizes, None, 0.5, 3.0)
    check(output, wanted, dtype if dtype is torch.float32 else cache.keys.dtype)


def test_many_short_chunks_and_slices_of_wider_rows(device: torch.device) -> None:
    """More sequences than tiles of queries, in rows that hold more than the queries and the results."""
    sizes = tuple([1, 0, 2, 5] * 5)
    cache = PagedCache.random(
        tuple(size + 3 for size in sizes),
        num_kv_heads=1,
        block_size=16,
        head_dim=64,
        dtype=torch.float32,
        device=device,
    )
    fused = torch.randn(sum(sizes), 4, 64, device=device)
    wide = torch.full((sum(sizes), 3, 64), 9.0, device=device)
    prefill_attention(
        fused[:, :2],
        cache.keys,
        cache.values,
        cache.block_tables,
        starts_of(sizes, cache),
        cache.lengths,
        scale=SCALE,
        output=wide[:, 1:],
        config=SMALL,
    )
    check(wide[:, 1:], expected(fused[:, :2].contiguous(), cache, sizes), torch.float32)
    assert (wide[:, 0] == 9).all()


@pytest.mark.slow
def test_more_sequences_than_are_searched_at_once(device: torch.device) -> None:
    sizes = tuple(int(index in (0, 3, 1021, 1022, 1023, 1024, 1098)) * 2 for index in range(1100))
    cache = PagedCache.random(sizes, num_kv_heads=1, block_size=16, head_dim=64, dtype=torch.float32, device=device)
    query = torch.randn(sum(sizes) + 1, 1, 64, device=device)
    output = prefill_attention(
        query,
        cache.keys,
        cache.values,
        cache.block_tables,
        starts_of(sizes, cache),
        cache.lengths,
        scale=SCALE,
        config=SMALL,
    )
    check(output, expected(query, cache, sizes), torch.float32)


@pytest.mark.parametrize("num_sequences", [0, 1])
@pytest.mark.parametrize("num_tokens", [0, 20])
def test_nothing_to_prefill(num_tokens: int, num_sequences: int, device: torch.device) -> None:
    """No tokens at all, or only padding; of no sequences, or of one with an empty chunk."""
    cache = PagedCache.random((5,), num_kv_heads=1, block_size=16, head_dim=64, dtype=torch.float32, device=device)
    output = prefill_attention(
        torch.randn(num_tokens, 4, 64, device=device),
        cache.keys,
        cache.values,
        cache.block_tables[:num_sequences],
        starts_of((0,) * num_sequences, cache),
        cache.lengths[:num_sequences],
        scale=SCALE,
    )
    assert torch.equal(output.cpu(), torch.zeros(num_tokens, 4, 64))


@pytest.mark.parametrize(
    "change", ["starts", "every other start", "lengths", "float lengths", "dtype", "head_dim", "scale", "nan", "output"]
)
def test_arguments_that_do_not_fit_are_named(change: str, device: torch.device) -> None:
    cache = PagedCache.random((9,), num_kv_heads=2, block_size=16, head_dim=64, dtype=torch.float32, device=device)
    query = torch.randn(9, 4, 48 if change == "head_dim" else 64, device=device)
    starts, lengths = starts_of((9,), cache), cache.lengths
    if change == "starts":
        starts = starts[:1]
    elif change == "every other start":
        starts = starts.repeat_interleave(2)[::2]
    elif change == "lengths":
        lengths = lengths[:0]
    elif change == "float lengths":
        lengths = lengths.float()
    with pytest.raises(ConfigError):
        prefill_attention(
            query.half() if change == "dtype" else query,
            cache.keys,
            cache.values,
            cache.block_tables,
            starts,
            lengths,
            scale={"scale": -1.0, "nan": math.nan}.get(change, SCALE),
            output=query[:8] if change == "output" else None,
        )


def test_flops_are_those_of_visible_pairs() -> None:
    """Three queries behind two tokens see 3, 4 and 5; with a window of four the last sees 4."""
    assert prefill_flops([3, 0], [5, 7], num_heads=2, head_dim=64) == 4 * 2 * 64 * 12
    assert prefill_flops([3], [5], num_heads=2, head_dim=64, window=4) == 4 * 2 * 64 * 11


def test_configurations_fit_an_sm() -> None:
    for head_dim in (64, 96, 128, 256):
        for cache_bytes, query_bytes in ((1, 2), (2, 2), (1, 4), (4, 4)):
            config = prefill_config(head_dim=head_dim, query_bytes=query_bytes)
            shared = config.shared_bytes(head_dim=head_dim, cache_bytes=cache_bytes, query_bytes=query_bytes)
            assert shared <= 227 * 1024


@pytest.mark.parametrize(("group_size", "packed"), [(1, 1), (4, 4), (5, 1), (6, 2), (8, 8), (16, 8)])
def test_packed_heads_divide_their_group(group_size: int, packed: int) -> None:
    assert packed_heads(group_size, 128) == packed
