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
from engine.kernels.gpu.attention_arguments import check_attention
from engine.kernels.gpu.dot import dot
from engine.kernels.gpu.fp8_cache import widened
from engine.kernels.gpu.prefill_config import PrefillConfig, packed_heads, prefill_config
from engine.kernels.gpu.row_launch import limited

# Smaller than any score, yet finite: the difference of two of them is a number.
_LOWEST = tl.constexpr(-1.0e30)
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
    if len(query_starts_P1) != num_sequences + 1 or len(context_lengths_P) != num_sequences:
        raise ConfigError(
            f"{len(query_starts_P1)} query starts and {len(context_lengths_P)} context lengths do not fit "
            f"{num_sequences} block tables: one start more than tables and one length for each are right."
        )
    if scale * key_scale <= 0:
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
    kernel, grid = attend_chunks, (num_columns, num_tiles)
    if num_programs < num_columns * num_tiles:
        kernel, grid = attend_chunks_limited, (num_programs,)
    kernel[grid](
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
    _attend_rows(
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
        _attend_rows(
            first_head, number, query, keys, values, block_tables, query_starts, context_lengths, output, score_scale,
            value_scale, query_stride, output_stride, table_stride, num_tokens, num_sequences, window, HAS_WINDOW,
            NUM_KV_HEADS, GROUP, PACKED, HEAD_DIM, WIDTH, BLOCK_SIZE, ROWS, TILE, SEARCH,
        )  # fmt: skip


@triton.jit
def _attend_rows(
    first_head: tl.tensor,
    number: tl.tensor,
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
    """One tile: some queries of one sequence, with some heads that share a KV head."""
    QUERIES: tl.constexpr = ROWS // PACKED
    sequence, start = _sequence_of(number, query_starts, num_sequences, QUERIES, SEARCH)
    first_query = (number - start // QUERIES - sequence) * QUERIES
    is_padding = sequence == num_sequences
    stop = tl.load(query_starts + sequence + 1, mask=sequence < num_sequences, other=num_tokens).to(tl.int32)
    if (sequence >= 0) & (start + first_query < stop):
        query_M = first_query + tl.arange(0, ROWS) // PACKED
        head_M = first_head + tl.arange(0, ROWS) % PACKED
        dims_d = tl.arange(0, WIDTH)
        is_real_Md = (start + query_M < stop)[:, None] & (dims_d < HEAD_DIM)[None, :]
        token_M = (start + query_M).to(tl.int64)
        offsets_Md = head_M[:, None] * HEAD_DIM + dims_d[None, :]
        output_Md = output + token_M[:, None] * output_stride + offsets_Md
        if is_padding:
            tl.store(output_Md, tl.zeros((ROWS, WIDTH), output.dtype.element_ty), mask=is_real_Md)
        else:
            query_Md = tl.load(query + token_M[:, None] * query_stride + offsets_Md, mask=is_real_Md, other=0.0)
            # Positions: of the tile's first query, and behind its last one.
            context = tl.load(context_lengths + sequence).to(tl.int32)
            position = context - (stop - start) + first_query
            end = tl.minimum(position + QUERIES, context)
            begin_tile = 0
            unmasked_from = 0
            if HAS_WINDOW:
                begin_tile = tl.maximum(position - window + 1, 0) // TILE
                unmasked_from = (tl.maximum(end - window, 0) + TILE - 1) // TILE
            unmasked_to = tl.maximum((position + 1) // TILE, begin_tile)
            unmasked_from = tl.minimum(unmasked_from, unmasked_to)
            table = block_tables + sequence.to(tl.int64) * table_stride
            kv_head = first_head // GROUP
            last_M = context - (stop - start) + query_M
            sums_Md, total_M = _attend_tile(
                query_Md, keys, values, table, kv_head, begin_tile, unmasked_from, unmasked_to, end, last_M, window,
                score_scale, HAS_WINDOW, NUM_KV_HEADS, HEAD_DIM, WIDTH, BLOCK_SIZE, TILE,
            )  # fmt: skip
            attended_Md = sums_Md * (value_scale / tl.maximum(total_M, 1.0e-30))[:, None]
            tl.store(output_Md, attended_Md.to(output.dtype.element_ty), mask=is_real_Md)


@triton.jit
def _sequence_of(
    number: tl.tensor,
    query_starts: tl.tensor,
    num_sequences: tl.tensor,
    QUERIES: tl.constexpr,
    SEARCH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The sequence that a tile belongs to and its first query: the last whose tiles begin at `number` or before.

    Those of sequence p begin at start // QUERIES + p, which leaves each as many as it needs; p = P is the padding, and
    p = -1 what lies before the first.
    """
    sequence = -1
    for first in range(0, num_sequences + 1, SEARCH):
        number_S = first + tl.arange(0, SEARCH)
        start_S = tl.load(query_starts + number_S, mask=number_S <= num_sequences, other=0).to(tl.int32)
        is_before_S = (number_S <= num_sequences) & (start_S // QUERIES + number_S <= number)
        sequence += tl.sum(is_before_S.to(tl.int32))
    return sequence, tl.load(query_starts + tl.maximum(sequence, 0)).to(tl.int32)


@triton.jit
def _attend_tile(
    query_Md: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    kv_head: tl.tensor,
    begin_tile: tl.tensor,
    unmasked_from: tl.tensor,
    unmasked_to: tl.tensor,
    end: tl.tensor,
    last_M: tl.tensor,
    window: tl.tensor,
    score_scale: tl.tensor,
    HAS_WINDOW: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Weighted values and sums of weights of the rows, over the tiles of keys from `begin_tile` to position `end`."""
    largest_M = tl.full((query_Md.shape[0],), _LOWEST, tl.float32)
    total_M = tl.zeros((query_Md.shape[0],), tl.float32)
    sums_Md = tl.zeros((query_Md.shape[0], WIDTH), tl.float32)
    tokens_L = tl.arange(0, TILE)
    dims_d = tl.arange(0, WIDTH)
    place = _place(table, begin_tile, end, tokens_L, BLOCK_SIZE, TILE)
    for tile in tl.range(begin_tile, (end + TILE - 1) // TILE):
        # Loaded a tile ahead, so that loads of keys and values wait for no other.
        next_place = _place(table, tile + 1, end, tokens_L, BLOCK_SIZE, TILE)
        offset, slots_L = _slots(place, kv_head, tile, tokens_L, NUM_KV_HEADS, BLOCK_SIZE, TILE)
        offsets_Ld = slots_L[:, None] * HEAD_DIM + dims_d[None, :]
        if WIDTH == HEAD_DIM:
            key_Ld = tl.load(keys + offset * HEAD_DIM + offsets_Ld)
            value_Ld = tl.load(values + offset * HEAD_DIM + offsets_Ld)
        else:
            is_read_Ld = (tokens_L < TILE)[:, None] & (dims_d < HEAD_DIM)[None, :]
            key_Ld = tl.load(keys + offset * HEAD_DIM + offsets_Ld, mask=is_read_Ld, other=0.0)
            value_Ld = tl.load(values + offset * HEAD_DIM + offsets_Ld, mask=is_read_Ld, other=0.0)
        key_Ld, value_Ld, wide_Md = widened(key_Ld, value_Ld, query_Md)
        scores_ML = dot(wide_Md, tl.trans(key_Ld), tl.zeros((query_Md.shape[0], TILE), tl.float32))
        if (tile < unmasked_from) | (tile >= unmasked_to):
            position_L = tile * TILE + tokens_L
            is_visible_ML = position_L[None, :] <= last_M[:, None]
            if HAS_WINDOW:
                is_visible_ML = is_visible_ML & (position_L[None, :] > last_M[:, None] - window)
            scores_ML = tl.where(is_visible_ML, scores_ML, float("-inf"))
        before_M = largest_M
        largest_M = tl.maximum(before_M, tl.max(scores_ML, 1) * score_scale)
        decay_M = tl.exp2(before_M - largest_M)
        weights_ML = tl.exp2(scores_ML * score_scale - largest_M[:, None])
        total_M = total_M * decay_M + tl.sum(weights_ML, 1)
        sums_Md = dot(weights_ML.to(value_Ld.dtype), value_Ld, sums_Md * decay_M[:, None])
        place = next_place
    return sums_Md, total_M


@triton.jit
def _place(
    table: tl.tensor,
    tile: tl.tensor,
    end: tl.tensor,
    tokens_L: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """The block of a tile, or of each of its tokens where it spans several; behind the context one that exists."""
    if TILE > BLOCK_SIZE:
        first_L = tile * TILE + tokens_L // BLOCK_SIZE * BLOCK_SIZE
        place = tl.load(table + first_L // BLOCK_SIZE, mask=first_L < end, other=0)
    else:
        place = tl.load(table + tile * TILE // BLOCK_SIZE, mask=tile * TILE < end, other=0)
    return place


@triton.jit
def _slots(
    place: tl.tensor,
    kv_head: tl.tensor,
    tile: tl.tensor,
    tokens_L: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Slots of a tile's tokens in a cache [N, K, S], as the first one and what to add: 64 bits only where needed."""
    if TILE > BLOCK_SIZE:
        offset = kv_head * BLOCK_SIZE
        slots_L = place.to(tl.int64) * (NUM_KV_HEADS * BLOCK_SIZE) + tokens_L % BLOCK_SIZE
    else:
        offset = (place.to(tl.int64) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + tile % (BLOCK_SIZE // TILE) * TILE
        slots_L = tokens_L
    return offset, slots_L
