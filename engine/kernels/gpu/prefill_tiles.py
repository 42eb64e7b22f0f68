"""A tile of prefill attention: which queries of which sequence it has, and the running softmax over their context.

`prefill_attention` says why it is computed so, and hands the tiles out to programs.

Legend: P sequences, M rows of a tile of queries, L tokens of a tile of keys, d head dimension.
"""

# mypy: disable-error-code="misc"

import triton
import triton.language as tl

from engine.kernels.gpu.dot import dot
from engine.kernels.gpu.fp8_cache import widened

# Smaller than any score, yet finite: the difference of two of them is a number.
_LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def attend_rows(
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
