"""Paged prefill attention: causal attention of prompt chunks over all that is cached of their sequences.

Bound: compute. A chunk of Q tokens behind c others takes 4 H d Q (c + Q / 2) flops: a prompt of 1,024 tokens 25 us in
each layer of Llama-3-8B at 350 TFLOP/s. The choices follow from that:

- A program has a tile of M rows, queries x heads of one KV head, and walks the tiles of keys and values that any of
  them sees, with the running softmax of FlashAttention-2 (arXiv:2307.08691, section 3.1) in registers. Heads that share
  a KV head are packed into the rows, so short chunks still fill tensor cores and the diagonal wastes less.
- Tiles above the diagonal or before every window are not read. Masks are computed only in tiles that the diagonal or
  the edge of a window crosses; the loop over all others has none.
- The grid follows from Q and P alone: each sequence has its tiles and one to spare, so a tile finds its sequence by
  counting starts. Tiles of late sequences and late tokens, which have the longest contexts, come first; the heads of a
  tile follow each other and meet the same blocks of keys in L2.
- With `num_ctas` so many programs walk over the tiles in the same order, and leave the other SMs to what runs beside.
- Keys and values arrive in shared memory (cp.async) while the previous tile is multiplied; products are wgmma, the
  weights stay in registers.

An fp8 cache is widened as `fp8_cache` says; `key_scale` is a factor of the scores, `value_scale` one of the result.

Legend: P sequences with Q tokens together, H query heads, K key/value heads, d head dimension, N cache blocks of S
slots, B width of the block tables, M rows of a tile of queries, L tokens of a tile of keys.
"""

# mypy: disable-error-code="misc"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.gpu.attention_arguments import check_attention, check_integers
from engine.kernels.gpu.prefill_config import PrefillConfig, packed_heads, prefill_config
from engine.kernels.gpu.prefill_tiles import attend_rows
from engine.kernels.gpu.row_launch import limited

# Starts of sequences compared at once: as many whatever their number, which must not mean another kernel to compile.
_SEARCH = 256


def prefill_attention(
    query_QHd: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables_PB: Tensor,
    query_starts_P1: Tensor,
    context_lengths_P: Tensor,
    *,
    scale: float,
    window: int | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    output: Tensor | None = None,
    num_ctas: int | None = None,
    config: PrefillConfig | None = None,
) -> Tensor:
    """[Q, H, d] of the queries' dtype, by a program for each tile, or by at most `num_ctas`.

    Chunk i is the queries from `query_starts_P1[i]` up to `query_starts_P1[i + 1]`, the last tokens of the
    `context_lengths_P[i]` that are cached of its sequence. Chunks may be empty. Queries behind the last chunk give
    zeros; rows of the output before the first chunk are somebody else's and stay as they are. Keys and values are
    [N, K, S, d]; queries and output may be slices of wider rows. `scale` is positive. Raises `ConfigError` for shapes
    or dtypes that do not fit.
    """
    check_attention(query_QHd, keys, values, block_tables_PB, window, output)
    num_sequences = len(block_tables_PB)
    _check_chunks(query_starts_P1, context_lengths_P, num_sequences)
    if not scale * key_scale > 0:
        raise ConfigError(f"scale {scale} x key_scale {key_scale} must be positive.")
    num_tokens, num_heads, head_dim = query_QHd.shape
    num_kv_heads, block_size = keys.shape[1:3]
    if config is None:
        config = prefill_config(head_dim=head_dim, query_bytes=query_QHd.element_size())
    num_packed = packed_heads(num_heads // num_kv_heads, config.rows)
    if output is None:
        output = torch.empty(query_QHd.shape, dtype=query_QHd.dtype, device=query_QHd.device)
    if num_tokens == 0:
        return output
    num_tiles = num_tokens // (config.rows // num_packed) + num_sequences + 1
    options = {} if config.max_registers is None else {"maxnreg": config.max_registers}
    num_columns = num_heads // num_packed
    num_programs = limited(num_columns * num_tiles, num_ctas)
    is_limited = num_programs < num_columns * num_tiles
    kernel = attend_chunks_limited if is_limited else attend_chunks
    kernel[(num_programs,) if is_limited else (num_columns, num_tiles)](
        query_QHd,
        keys,
        values,
        block_tables_PB,
        query_starts_P1,
        context_lengths_P,
        output,
        scale * key_scale * math.log2(math.e),
        value_scale,
        query_QHd.stride(0),
        output.stride(0),
        block_tables_PB.stride(0),
        num_tokens,
        num_sequences,
        num_tiles,
        0 if window is None else window,
        HAS_WINDOW=window is not None,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        PACKED=num_packed,
        HEAD_DIM=head_dim,
        WIDTH=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        ROWS=config.rows,
        TILE=config.tile,
        SEARCH=_SEARCH,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )
    return output


def _check_chunks(query_starts_P1: Tensor, context_lengths_P: Tensor, num_sequences: int) -> None:
    """Raise `ConfigError` unless there are as many as sequences."""
    if len(query_starts_P1) != num_sequences + 1 or len(context_lengths_P) != num_sequences:
        raise ConfigError(
            f"{len(query_starts_P1)} query starts and {len(context_lengths_P)} context lengths do not fit "
            f"{num_sequences} block tables: one start more than tables and one length for each are right."
        )
    check_integers("query_starts_P1", query_starts_P1)
    check_integers("context_lengths_P", context_lengths_P)


def prefill_flops(
    chunk_sizes: list[int], context_lengths: list[int], *, num_heads: int, head_dim: int, window: int | None = None
) -> int:
    """Additions and multiplications of what the queries see: two products of d for every head and pair of tokens."""
    num_pairs = 0
    for size, length in zip(chunk_sizes, context_lengths, strict=True):
        seen = range(length - size + 1, length + 1)
        num_pairs += sum(seen) if window is None else sum(min(count, window) for count in seen)
    return 4 * num_heads * head_dim * num_pairs


_NOT_SPECIALISED = [
    "block_tables",
    "query_starts",
    "context_lengths",
    "table_stride",
    "num_tokens",
    "num_sequences",
    "num_tiles",
    "window",
]


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def attend_chunks(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    block_tables: tl.tensor,
    query_starts: tl.tensor,
    context_lengths: tl.tensor,
    output: tl.tensor,
    score_scale: tl.tensor,
    value_scale: tl.tensor,
    query_stride: tl.tensor,
    output_stride: tl.tensor,
    table_stride: tl.tensor,
    num_tokens: tl.tensor,
    num_sequences: tl.tensor,
    num_tiles: tl.tensor,
    window: tl.tensor,
    HAS_WINDOW: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SEARCH: tl.constexpr,
) -> None:
    """A program for each tile."""
    first_head = tl.program_id(0) * PACKED
    number = num_tiles - 1 - tl.program_id(1)
    attend_rows(
        first_head, number, query, keys, values, block_tables, query_starts, context_lengths, output, score_scale,
        value_scale, query_stride, output_stride, table_stride, num_tokens, num_sequences, window, HAS_WINDOW,
        NUM_KV_HEADS, GROUP, PACKED, HEAD_DIM, WIDTH, BLOCK_SIZE, ROWS, TILE, SEARCH,
    )  # fmt: skip


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def attend_chunks_limited(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    block_tables: tl.tensor,
    query_starts: tl.tensor,
    context_lengths: tl.tensor,
    output: tl.tensor,
    score_scale: tl.tensor,
    value_scale: tl.tensor,
    query_stride: tl.tensor,
    output_stride: tl.tensor,
    table_stride: tl.tensor,
    num_tokens: tl.tensor,
    num_sequences: tl.tensor,
    num_tiles: tl.tensor,
    window: tl.tensor,
    HAS_WINDOW: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SEARCH: tl.constexpr,
) -> None:
    """Programs that take one tile after the other, in the order in which `attend_chunks` launches them."""
    NUM_COLUMNS: tl.constexpr = NUM_KV_HEADS * GROUP // PACKED
    for index in range(tl.program_id(0), num_tiles * NUM_COLUMNS, tl.num_programs(0)):
        first_head = index % NUM_COLUMNS * PACKED
        number = num_tiles - 1 - index // NUM_COLUMNS
        attend_rows(
            first_head, number, query, keys, values, block_tables, query_starts, context_lengths, output, score_scale,
            value_scale, query_stride, output_stride, table_stride, num_tokens, num_sequences, window, HAS_WINDOW,
            NUM_KV_HEADS, GROUP, PACKED, HEAD_DIM, WIDTH, BLOCK_SIZE, ROWS, TILE, SEARCH,
        )  # fmt: skip
