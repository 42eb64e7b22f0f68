"""Decode and prefill attention write to one buffer, in any order: each row is what it alone would be."""

import pytest
import torch

from engine.kernels import reference
from engine.kernels.gpu.decode_attention import decode_attention
from engine.kernels.gpu.decode_config import decode_config
from engine.kernels.gpu.decode_plan import DecodeScratch
from engine.kernels.gpu.prefill_attention import prefill_attention
from tests.engine.kernels.gpu.paged_cache import PagedCache

SCALE = 0.25
NUM_CTAS, NUM_SMS = 4, 2


@pytest.mark.parametrize("num_lanes", [3, 20, 48])
@pytest.mark.parametrize("num_decodes", [0, 1, 3])
@pytest.mark.parametrize("sizes", [(), (7,), (20, 1, 13)])
@pytest.mark.parametrize(("window", "decodes_first"), [(None, True), (10, False)])
def test_every_row_is_its_own(
    num_lanes: int,
    num_decodes: int,
    sizes: tuple[int, ...],
    window: int | None,
    decodes_first: bool,
    device: torch.device,
) -> None:
    """Fewer lanes than rows, lanes that lie where chunks do, and as many lanes as rows. No lane has a decode, too."""
    num_rows, num_chunks = 48, 4
    lengths = (5, 40, 17)[:num_decodes] + (33, 1, 30)[: len(sizes)]
    cache = PagedCache.random(
        (*lengths, 1), num_kv_heads=2, block_size=16, head_dim=16, dtype=torch.float32, device=device
    )
    tables, width = cache.block_tables, cache.block_tables.shape[1]
    lane_tables = torch.zeros(num_lanes, width, dtype=tables.dtype, device=device)
    lane_lengths = torch.full((num_lanes,), -1, dtype=torch.int64, device=device)
    lane_tables[:num_decodes], lane_lengths[:num_decodes] = tables[:num_decodes], cache.lengths[:num_decodes]
    chunk_tables = torch.zeros(num_chunks, width, dtype=tables.dtype, device=device)
    chunk_lengths = torch.zeros(num_chunks, dtype=torch.int64, device=device)
    stop = len(lengths)
    chunk_tables[: len(sizes)], chunk_lengths[: len(sizes)] = tables[num_decodes:stop], cache.lengths[num_decodes:stop]
    ends = [num_decodes + sum(sizes[: index + 1]) for index in range(num_chunks)]
    starts = torch.tensor([num_decodes, *ends], device=device)

    query = torch.randn(num_rows, 4, 16, device=device)
    output = torch.full_like(query, torch.nan)
    config = decode_config(head_dim=16, group_size=2, cache_bytes=4, query_bytes=4, num_ctas=NUM_CTAS, num_sms=NUM_SMS)
    scratch = DecodeScratch.allocate(
        max_rows=num_lanes,
        max_blocks=width,
        block_size=16,
        group_size=2,
        head_dim=16,
        max_ctas=NUM_CTAS,
        tile=config.tile,
        device=device,
    )

    def attend_decodes() -> None:
        decode_attention(
            query[:num_lanes],
            cache.keys,
            cache.values,
            lane_tables,
            lane_lengths,
            scale=SCALE,
            num_ctas=NUM_CTAS,
            num_sms=NUM_SMS,
            scratch=scratch,
            window=window,
            output=output[:num_lanes],
        )

    def attend_chunks() -> None:
        prefill_attention(
            query,
            cache.keys,
            cache.values,
            chunk_tables,
            starts,
            chunk_lengths,
            scale=SCALE,
            window=window,
            output=output,
        )

    for attend in (attend_decodes, attend_chunks)[:: 1 if decodes_first else -1]:
        attend()

    expected = torch.zeros(query.shape, dtype=torch.float64)
    wide, plain = query.cpu().double(), cache.plain()
    if num_decodes:
        expected[:num_decodes] = reference.decode_attention(
            wide[:num_decodes],
            *plain,
            tables[:num_decodes].cpu().long(),
            cache.lengths[:num_decodes].cpu().long(),
            max(lengths[:num_decodes]),
            SCALE,
            window,
        )
    if sizes:
        expected[num_decodes : num_decodes + sum(sizes)] = reference.prefill_attention(
            wide[num_decodes : num_decodes + sum(sizes)],
            *plain,
            tables[num_decodes:stop].cpu().long(),
            sizes,
            lengths[num_decodes:],
            SCALE,
            window,
        )
    torch.testing.assert_close(output.cpu().double(), expected, atol=1e-5, rtol=1e-5)
