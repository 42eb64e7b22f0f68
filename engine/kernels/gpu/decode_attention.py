"""Paged decode attention: one new token per sequence over its cached context, persistent and split over the device.

Three launches whose grids depend on the number of sequences and of CTAs alone: `decode_plan` shares out the work (once
for all layers of a step), `decode_shares` does it (the docstring there says how fast and why), `decode_merge` joins
what was cut. Lengths stay on the device.

Legend: D sequences, H query heads, K key/value heads, d head dimension, N cache blocks of S slots, B width of the block
tables.
"""

# mypy: disable-error-code="misc"

import math

import torch
import triton
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.gpu.attention_arguments import check_attention, check_integers
from engine.kernels.gpu.decode_config import DecodeConfig, decode_config, padded_rows
from engine.kernels.gpu.decode_merge import merge_parts
from engine.kernels.gpu.decode_plan import DecodeScratch, plan_decode
from engine.kernels.gpu.decode_shares import attend_shares


def decode_attention(
    query_DHd: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables_DB: Tensor,
    lengths_D: Tensor,
    *,
    scale: float,
    num_ctas: int,
    num_sms: int = 132,
    scratch: DecodeScratch,
    window: int | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    output: Tensor | None = None,
    is_planned: bool = False,
    config: DecodeConfig | None = None,
) -> Tensor:
    """[D, H, d] of the queries' dtype: each sequence's token over its `lengths_D` cached tokens, itself included.

    Keys and values are [N, K, S, d]; queries and output may be slices of wider rows. A row of length 0 gives zeros,
    one of a negative length stays as it is.
    `num_sms` are the SMs that the launch may use: those of the device, or of its partition. Two CTAs on each fill them;
    up to one on each leaves room for others and gets deeper stages. `is_planned` says that `scratch` still holds the
    plan of an earlier call with the same lengths, tables, window and tile (another layer of the step). Raises
    `ConfigError` for shapes, dtypes or a scratch that do not fit.
    """
    check_attention(query_DHd, keys, values, block_tables_DB, window, output)
    num_rows, num_heads, head_dim = query_DHd.shape
    if len(block_tables_DB) != num_rows or lengths_D.shape != (num_rows,):
        raise ConfigError(
            f"{num_rows} queries need a block table and a length each, not {len(block_tables_DB)} tables and lengths "
            f"{tuple(lengths_D.shape)}."
        )
    check_integers("lengths_D", lengths_D)
    num_kv_heads, block_size = keys.shape[1:3]
    group_size = num_heads // num_kv_heads
    if config is None:
        config = decode_config(
            head_dim=head_dim,
            group_size=group_size,
            cache_bytes=keys.element_size(),
            query_bytes=query_DHd.element_size(),
            num_ctas=num_ctas,
            num_sms=num_sms,
        )
    scratch.check(
        rows=num_rows,
        max_blocks=block_tables_DB.shape[1],
        block_size=block_size,
        group_size=group_size,
        head_dim=query_DHd.shape[2],
        num_ctas=num_ctas,
        tile=config.tile,
    )
    if output is None:
        output = torch.empty(query_DHd.shape, dtype=query_DHd.dtype, device=query_DHd.device)
    if num_rows == 0:
        return output
    if not is_planned:
        plan_decode(block_tables_DB, lengths_D, scratch, block_size=block_size, tile=config.tile, window=window)
    _launch(
        query_DHd, keys, values, scratch, output, config, num_ctas, scale * key_scale * math.log2(math.e), value_scale
    )
    merge_parts(scratch, output, num_kv_heads=num_kv_heads, num_ctas=num_ctas, value_scale=value_scale)
    return output


def _launch(
    query_DHd: Tensor,
    keys: Tensor,
    values: Tensor,
    scratch: DecodeScratch,
    output: Tensor,
    config: DecodeConfig,
    num_ctas: int,
    score_scale: float,
    value_scale: float,
) -> None:
    """Attend the shares of the plan in `scratch`."""
    num_heads, head_dim = query_DHd.shape[1:]
    num_kv_heads, block_size = keys.shape[1:3]
    group_size = num_heads // num_kv_heads
    options = {} if config.max_registers is None else {"maxnreg": config.max_registers}
    attend_shares[(num_ctas,)](
        query_DHd,
        keys,
        values,
        scratch.num_tiles,
        scratch.tiles,
        scratch.places,
        output,
        scratch.partial_sums,
        scratch.partial_weights,
        score_scale,
        value_scale,
        query_DHd.stride(0),
        output.stride(0),
        scratch.tiles.shape[1],
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group_size,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TILE=config.tile,
        ROWS=padded_rows(group_size),
        WIDTH=triton.next_power_of_2(head_dim),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )


def decode_bytes(lengths: list[int], *, num_heads: int, num_kv_heads: int, head_dim: int, cache_bytes: int) -> int:
    """What a call has to move at least: visible keys and values once, two-byte queries and results once."""
    return sum(lengths) * 2 * num_kv_heads * head_dim * cache_bytes + len(lengths) * 2 * num_heads * head_dim * 2
