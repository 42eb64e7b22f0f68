"""Decode attention on the device against plain attention in float64."""

import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels import reference
from engine.kernels.gpu.decode_attention import decode_attention, decode_bytes
from engine.kernels.gpu.decode_config import decode_config, padded_rows
from engine.kernels.gpu.decode_plan import DecodeScratch
from tests.engine.kernels.gpu.paged_cache import TOLERANCE, PagedCache

SCALE = 0.2


def scratch_of(cache: PagedCache, group_size: int, num_ctas: int, query_bytes: int) -> DecodeScratch:
    block_size, head_dim = cache.keys.shape[2:]
    config = decode_config(
        head_dim=head_dim,
        group_size=group_size,
        cache_bytes=cache.keys.element_size(),
        query_bytes=query_bytes,
        num_ctas=num_ctas,
    )
    return DecodeScratch.allocate(
        max_rows=len(cache.lengths),
        max_blocks=cache.block_tables.shape[1],
        block_size=block_size,
        group_size=group_size,
        head_dim=head_dim,
        max_ctas=num_ctas,
        tile=config.tile,
        device=cache.keys.device,
    )


def attend(
    query: Tensor,
    cache: PagedCache,
    num_ctas: int,
    window: int | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    output: Tensor | None = None,
) -> Tensor:
    scratch = scratch_of(cache, query.shape[1] // cache.keys.shape[1], num_ctas, query.element_size())
    return decode_attention(
        query,
        cache.keys,
        cache.values,
        cache.block_tables,
        cache.lengths,
        scale=SCALE,
        window=window,
        num_ctas=num_ctas,
        key_scale=key_scale,
        value_scale=value_scale,
        scratch=scratch,
        output=output,
    )


def expected(
    query: Tensor, cache: PagedCache, window: int | None = None, key_scale: float = 1.0, value_scale: float = 1.0
) -> Tensor:
    """The reference's answer in float64, and zeros for sequences without tokens."""
    lengths = cache.lengths.cpu().long()
    rows = (lengths > 0).nonzero().flatten()
    keys, values = cache.plain(key_scale, value_scale)
    result = torch.zeros(query.shape, dtype=torch.float64)
    tables = cache.block_tables.cpu().long()[rows]
    query = query.cpu().double()[rows]
    if len(rows):
        result[rows] = reference.decode_attention(
            query, keys, values, tables, lengths[rows], int(lengths.max()), SCALE, window
        )
    return result


def check(actual: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual.cpu().double(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("dtype", "group_size", "head_dim", "block_size"),
    [
        (torch.float32, 1, 64, 16),
        (torch.float32, 4, 128, 64),
        (torch.bfloat16, 4, 128, 64),
        (torch.bfloat16, 8, 64, 128),
        (torch.bfloat16, 5, 96, 32),
        (torch.float16, 1, 128, 64),
        (torch.float16, 2, 256, 16),
    ],
)
def test_ragged_lengths_with_empty_rows(
    dtype: torch.dtype, group_size: int, head_dim: int, block_size: int, device: torch.device
) -> None:
    lengths = (0, 1, block_size - 1, block_size, block_size + 1, 0, 150, 64, 129, 0)
    cache = PagedCache.random(
        lengths, num_kv_heads=2, block_size=block_size, head_dim=head_dim, dtype=dtype, device=device
    )
    query = torch.randn(len(lengths), 2 * group_size, head_dim).to(device, dtype)
    output = attend(query, cache, num_ctas=5)
    assert output.dtype == dtype
    assert not output[cache.lengths == 0].any()
    check(output, expected(query, cache), dtype)


@pytest.mark.parametrize("lengths", [(-1, 5, -1, 0, 40, -1), (-1, -1)], ids=["some", "all"])
def test_rows_of_a_negative_length_stay_as_they_are(lengths: tuple[int, ...], device: torch.device) -> None:
    cache = PagedCache.random(lengths, num_kv_heads=2, block_size=16, head_dim=16, dtype=torch.float32, device=device)
    query = torch.randn(len(lengths), 4, 16, device=device)
    output = torch.full_like(query, torch.nan)
    attend(query, cache, num_ctas=3, output=output)
    is_absent = cache.lengths.cpu() < 0
    assert output.cpu()[is_absent].isnan().all()
    check(output.cpu()[~is_absent], expected(query, cache)[~is_absent], torch.float32)


@pytest.mark.parametrize("num_ctas", [1, 3])
def test_a_step_without_decodes_has_no_tile_and_gives_zeros(num_ctas: int, device: torch.device) -> None:
    """More rows than programs, as lanes of a padded step are."""
    cache = PagedCache.random((0,) * 5, num_kv_heads=2, block_size=32, head_dim=64, dtype=torch.float32, device=device)
    query = torch.randn(5, 6, 64, device=device)
    output = torch.full((5, 6, 64), torch.nan, device=device)
    assert not attend(query, cache, num_ctas, output=output).any()


@pytest.mark.parametrize("num_ctas", [1, 3, 7, 40, 150])
def test_any_number_of_programs_gives_the_same(num_ctas: int, device: torch.device) -> None:
    """From one program for everything to many for one sequence, and more programs than tiles."""
    cache = PagedCache.random(
        (700, 3, 0, 64), num_kv_heads=2, block_size=32, head_dim=64, dtype=torch.float32, device=device
    )
    query = torch.randn(4, 6, 64, device=device)
    check(attend(query, cache, num_ctas), expected(query, cache), torch.float32)


@pytest.mark.parametrize("window", [1, 16, 63, 64, 65, 1000])
def test_window(window: int, device: torch.device) -> None:
    cache = PagedCache.random(
        (1, 64, 200, 0, 128, 65),
        num_kv_heads=1,
        block_size=64,
        head_dim=64,
        dtype=torch.float32,
        device=device,
        index_dtype=torch.int64,
    )
    query = torch.randn(6, 4, 64, device=device)
    check(attend(query, cache, 3, window), expected(query, cache, window), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_fp8_cache_is_its_numbers_times_their_scales(dtype: torch.dtype, device: torch.device) -> None:
    cache = PagedCache.random(
        (90, 0, 64, 17), num_kv_heads=2, block_size=64, head_dim=128, dtype=torch.float8_e4m3fn, device=device
    )
    query = torch.randn(4, 8, 128).to(device, dtype)
    wanted = expected(query, cache, None, 0.5, 3.0)
    check(attend(query, cache, 3, None, 0.5, 3.0), wanted, dtype if dtype is torch.float32 else cache.keys.dtype)


def test_queries_beyond_float16_are_cut_where_an_fp8_cache_widens_to_it(device: torch.device) -> None:
    cache = PagedCache.random(
        (40,), num_kv_heads=1, block_size=16, head_dim=64, dtype=torch.float8_e4m3fn, device=device
    )
    query = (torch.randint(2, (1, 2, 64)) * 2.0 - 1).to(device, torch.bfloat16)
    wanted = expected((query * 65504).double(), cache, None, 1e-6, 1.0)
    check(attend(query * 1e5, cache, 2, None, 1e-6, 1.0), wanted, cache.keys.dtype)


def test_queries_and_output_may_be_slices_of_wider_rows(device: torch.device) -> None:
    cache = PagedCache.random((70, 20), num_kv_heads=1, block_size=16, head_dim=64, dtype=torch.float32, device=device)
    fused = torch.randn(2, 6, 64, device=device)
    wide = torch.full((2, 6, 64), 9.0, device=device)
    returned = attend(fused[:, :4], cache, 3, output=wide[:, 1:5])
    check(wide[:, 1:5], expected(fused[:, :4].contiguous(), cache), torch.float32)
    assert returned.data_ptr() == wide[:, 1:5].data_ptr()
    assert (wide[:, 0] == 9).all()
    assert (wide[:, 5] == 9).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_a_query_that_overflows_leaves_others_alone(device: torch.device) -> None:
    cache = PagedCache.random(
        (40, 30, 20), num_kv_heads=1, block_size=32, head_dim=64, dtype=torch.float32, device=device
    )
    query = torch.randn(3, 2, 64, device=device)
    wanted = expected(query, cache)
    query[0] = float("inf")
    query[1, 0] = float("nan")
    output = attend(query, cache, 1)
    check(output[2], wanted[2], torch.float32)
    check(output[1, 1], wanted[1, 1], torch.float32)


def test_a_plan_serves_every_layer(device: torch.device) -> None:
    """The second layer has other keys and the same lengths; the plan of a larger batch before does not matter."""
    shape = {"num_kv_heads": 2, "block_size": 16, "head_dim": 64, "dtype": torch.float32, "device": device}
    large = PagedCache.random((200, 170, 30), **shape)  # type: ignore[arg-type]
    scratch = scratch_of(large, 2, 4, 4)
    small = PagedCache.random((5, 90), **shape)  # type: ignore[arg-type]
    query = torch.randn(3, 4, 64, device=device)
    for cache, layers in ((large, 1), (small, 2)):
        tables, rows = cache.block_tables, query[: len(cache.lengths)]
        for layer in range(layers):
            keys = cache.keys if layer == 0 else cache.keys.flip(-1)
            output = decode_attention(
                rows,
                keys.contiguous(),
                cache.values,
                tables,
                cache.lengths,
                scale=SCALE,
                num_ctas=4,
                scratch=scratch,
                is_planned=layer > 0,
            )
            shown = rows if layer == 0 else rows.flip(-1)
            check(output, expected(shown, cache), torch.float32)


def test_equal_calls_give_equal_bits(device: torch.device) -> None:
    cache = PagedCache.random(
        (300, 65), num_kv_heads=1, block_size=16, head_dim=64, dtype=torch.bfloat16, device=device
    )
    query = torch.randn(2, 4, 64).to(device, torch.bfloat16)
    assert torch.equal(attend(query, cache, 6), attend(query, cache, 6))


def test_no_sequences(device: torch.device) -> None:
    cache = PagedCache.random((5,), num_kv_heads=1, block_size=16, head_dim=64, dtype=torch.float32, device=device)
    scratch = scratch_of(cache, 4, 4, 4)
    tables, lengths = cache.block_tables[:0], cache.lengths[:0]
    query = torch.randn(0, 4, 64, device=device)
    output = decode_attention(
        query, cache.keys, cache.values, tables, lengths, scale=SCALE, num_ctas=4, scratch=scratch
    )
    assert output.shape == (0, 4, 64)


@pytest.mark.parametrize(
    "change",
    [
        "heads",
        "head_dim",
        "dtype",
        "tables",
        "float tables",
        "window",
        "ctas",
        "no ctas",
        "rows",
        "lengths",
        "float lengths",
        "every other length",
        "output",
    ],
)
def test_arguments_that_do_not_fit_are_named(change: str, device: torch.device) -> None:
    cache = PagedCache.random((40, 9), num_kv_heads=2, block_size=16, head_dim=64, dtype=torch.float32, device=device)
    scratch = scratch_of(cache, 2, 4, 4)
    query, tables, lengths, output = torch.randn(2, 4, 64, device=device), cache.block_tables, cache.lengths, None
    if change == "heads":
        query = torch.randn(2, 3, 64, device=device)
    elif change == "head_dim":
        query = torch.randn(2, 4, 32, device=device)
    elif change == "dtype":
        query = query.half()
    elif change == "tables":
        tables = tables[0]
    elif change == "rows":
        query, tables, lengths = (torch.cat([tensor] * 3) for tensor in (query, tables, lengths))
    elif change == "lengths":
        lengths = lengths[:1]
    elif change == "float tables":
        tables = tables.float()
    elif change == "float lengths":
        lengths = lengths.float()
    elif change == "every other length":
        lengths = lengths.repeat_interleave(2)[::2]
    elif change == "output":
        output = torch.empty(2, 64, 4, device=device).transpose(1, 2)
    with pytest.raises(ConfigError):
        decode_attention(
            query,
            cache.keys,
            cache.values,
            tables,
            lengths,
            scale=SCALE,
            window=0 if change == "window" else None,
            num_ctas={"ctas": 5, "no ctas": 0}.get(change, 4),
            scratch=scratch,
            output=output,
        )


def test_configurations_fit_their_multiprocessor() -> None:
    """Two CTAs on each SM when there are that many, deep stages when there are few."""
    for head_dim in (64, 128, 256):
        for cache_bytes, query_bytes in ((1, 2), (2, 2), (4, 4)):
            sizes = {"head_dim": head_dim, "cache_bytes": cache_bytes, "query_bytes": query_bytes}
            many = decode_config(group_size=4, num_ctas=264, **sizes)
            few = decode_config(group_size=4, num_ctas=40, **sizes)
            assert 2 * (many.shared_bytes(rows=padded_rows(4), **sizes) + 1024) <= 228 * 1024
            assert few.shared_bytes(rows=padded_rows(4), **sizes) <= 227 * 1024
            assert few.num_stages * few.tile >= many.num_stages * many.tile


def test_bytes_of_a_batch() -> None:
    """Llama-3-8B: 4 KiB per cached token, 8 KiB of queries and as many of results per sequence."""
    shape = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    assert decode_bytes([1000, 0], cache_bytes=2, **shape) == 1000 * 4096 + 2 * 2 * 8192
