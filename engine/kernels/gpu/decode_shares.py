"""The kernel of paged decode attention: programs that walk equal shares of all cached context.

Bound: memory. Every cached key and value is read once, 4 KiB per token at Llama-3-8B's shapes in bfloat16; 512
sequences of 1,300 tokens are 2.7 GB of a layer, 0.68 ms at 4 TB/s. The choices follow from that:

- `decode_plan` gives each of `num_ctas` programs an equal, unbroken share of (head, sequence, tile of the context).
  A program walks it in one loop, not one loop per sequence: loads of the next sequence are in flight while this one
  ends. What a tile needs to be found (row, bounds, block) is loaded a step ahead, so no load waits for another.
- Keys, values and queries of a tile arrive in shared memory, several stages ahead (cp.async, past L1). A tile is 64
  tokens: at 64 slots per block and d = 128 one contiguous 16 KiB each of keys and of values. Slots behind the end of
  a sequence, or before its window, are not read. KV loads ask to be evicted first from L2; Triton 3.6 and 3.7 do not
  pass that on to asynchronous copies.
- Products are transposed, keys [L, d] x queries [d, R] and values [d, L] x weights [L, R]: the 64 tokens are the M of
  wgmma, which then takes keys and values from shared memory as they lie, without a pass through registers. The query
  heads of a group are the R columns, padded to 16.
- Weights are summed per token and reduced over tokens once per sequence, not once per tile; the largest score is
  needed in every tile. Powers of two: the scale includes log2(e).
- A context cut between programs leaves parts in float32 that `decode_merge` joins in the order of the context. So the
  result depends on the lengths of the batch and on `num_ctas`, not on timing.

An fp8 cache is widened as `fp8_cache` says; `key_scale` is a factor of the scores, `value_scale` one of the result.

Legend: D sequences, H query heads, K key/value heads, d head dimension, N cache blocks of S slots, B width of the block
tables, L tokens of a tile, R padded query heads of a group.
"""

# mypy: disable-error-code="misc"

import triton
import triton.language as tl

from engine.kernels.gpu.decode_plan import FIRST_TILE, LAST_TILE, share_of
from engine.kernels.gpu.dot import dot
from engine.kernels.gpu.fp8_cache import widened

# Smaller than any score, yet finite: the difference of two of them is a number.
_LOWEST = tl.constexpr(-1.0e30)


@triton.jit(do_not_specialize=["score_scale", "value_scale", "capacity"])
def attend_shares(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    num_planned: tl.tensor,
    tiles: tl.tensor,
    places: tl.tensor,
    output: tl.tensor,
    partial_sums: tl.tensor,
    partial_weights: tl.tensor,
    score_scale: tl.tensor,
    value_scale: tl.tensor,
    query_stride: tl.tensor,
    output_stride: tl.tensor,
    capacity: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """A program's share. A part that another program continues or began goes to scratch, the rest to `output`."""
    program = tl.program_id(0)
    num_tiles = tl.load(num_planned)
    first, last = share_of(program, tl.num_programs(0), num_tiles * NUM_KV_HEADS)
    tokens_L = tl.arange(0, TILE)
    dims_d = tl.arange(0, WIDTH)
    heads_R = tl.arange(0, ROWS)
    head = first // tl.maximum(num_tiles, 1)
    tile = first % tl.maximum(num_tiles, 1)
    row = tl.load(tiles + tile)
    bounds = tl.load(tiles + capacity + tile)
    place = _place(places, tile, tokens_L, BLOCK_SIZE, TILE)
    is_whole = first < 0  # whether the sequence began in this share: not before its first tile is met
    largest_R = tl.full((ROWS,), _LOWEST, tl.float32)
    totals_LR = tl.zeros((TILE, ROWS), tl.float32)
    sums_dR = tl.zeros((WIDTH, ROWS), tl.float32)
    for step in tl.range(first, last):
        is_last_of_head = tile + 1 == num_tiles
        next_tile = tl.where(is_last_of_head, 0, tile + 1)
        next_head = tl.where(is_last_of_head, head + 1, head)
        next_row = tl.load(tiles + next_tile)
        next_bounds = tl.load(tiles + capacity + next_tile)
        next_place = _place(places, next_tile, tokens_L, BLOCK_SIZE, TILE)

        is_first_tile = (bounds & FIRST_TILE) != 0
        is_last_tile = (bounds & LAST_TILE) != 0
        is_whole = is_whole | is_first_tile
        is_visible_L = (tokens_L >= (bounds & 0xFF)) & (tokens_L < ((bounds >> 8) & 0xFF))
        key_Ld, value_Ld = _cached(
            keys, values, place, head, is_visible_L, tokens_L, dims_d, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE
        )
        is_real_Rd = (heads_R < GROUP)[:, None] & (dims_d < HEAD_DIM)[None, :]
        offsets_Rd = (head * GROUP + heads_R[:, None]) * HEAD_DIM + dims_d[None, :]
        query_Rd = tl.load(query + row.to(tl.int64) * query_stride + offsets_Rd, mask=is_real_Rd, other=0.0)

        largest_R, totals_LR, sums_dR = _with_tile(
            key_Ld, value_Ld, query_Rd, is_visible_L, is_first_tile, score_scale, largest_R, totals_LR, sums_dR
        )
        if is_last_tile | (step + 1 == last):
            total_R = tl.sum(totals_LR, 0)
            if is_last_tile & is_whole:
                attended_dR = sums_dR * (value_scale / tl.maximum(total_R, 1.0e-30))[None, :]
                tl.store(
                    tl.trans(output + row.to(tl.int64) * output_stride + offsets_Rd),
                    attended_dR.to(output.dtype.element_ty),
                    mask=tl.trans(is_real_Rd),
                )
            else:
                part = program * 2 + is_whole.to(tl.int32)
                _leave_part(
                    partial_sums, partial_weights, part, largest_R, total_R, sums_dR, heads_R, dims_d, GROUP, WIDTH
                )
        head = next_head
        tile = next_tile
        row = next_row
        bounds = next_bounds
        place = next_place


@triton.jit
def _cached(
    keys: tl.tensor,
    values: tl.tensor,
    place: tl.tensor,
    head: tl.tensor,
    is_visible_L: tl.tensor,
    tokens_L: tl.tensor,
    dims_d: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Keys and values of a tile, zero where nothing is visible: that is not read."""
    offset, slots_L = _slots(place, head, tokens_L, NUM_KV_HEADS, BLOCK_SIZE, TILE)
    offsets_Ld = slots_L[:, None] * HEAD_DIM + dims_d[None, :]
    is_read_Ld = is_visible_L[:, None] & (dims_d < HEAD_DIM)[None, :]
    key_Ld = tl.load(keys + offset * HEAD_DIM + offsets_Ld, mask=is_read_Ld, other=0.0, eviction_policy="evict_first")
    value_Ld = tl.load(
        values + offset * HEAD_DIM + offsets_Ld, mask=is_read_Ld, other=0.0, eviction_policy="evict_first"
    )
    return key_Ld, value_Ld


@triton.jit
def _with_tile(
    key_Ld: tl.tensor,
    value_Ld: tl.tensor,
    query_Rd: tl.tensor,
    is_visible_L: tl.tensor,
    is_first_tile: tl.tensor,
    score_scale: tl.tensor,
    largest_R: tl.tensor,
    totals_LR: tl.tensor,
    sums_dR: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Largest scores, weights by token modulo L and weighted values with one more tile, or with a sequence's first."""
    key_Ld, value_Ld, query_Rd = widened(key_Ld, value_Ld, query_Rd)
    scores_LR = dot(key_Ld, tl.trans(query_Rd), tl.zeros_like(totals_LR))
    scores_LR = tl.where(is_visible_L[:, None], scores_LR * score_scale, float("-inf"))
    before_R = tl.where(is_first_tile, _LOWEST, largest_R)
    largest_R = tl.maximum(before_R, tl.max(scores_LR, 0))
    decay_R = tl.exp2(before_R - largest_R)
    weights_LR = tl.exp2(scores_LR - largest_R[None, :])
    # A choice, not a product with zero: an infinity of one sequence must not reach the next.
    totals_LR = tl.where(is_first_tile, 0.0, totals_LR * decay_R[None, :]) + weights_LR
    sums_dR = tl.where(is_first_tile, 0.0, sums_dR * decay_R[None, :])
    return largest_R, totals_LR, dot(tl.trans(value_Ld), weights_LR.to(value_Ld.dtype), sums_dR)


@triton.jit
def _leave_part(
    partial_sums: tl.tensor,
    partial_weights: tl.tensor,
    part: tl.tensor,
    largest_R: tl.tensor,
    total_R: tl.tensor,
    sums_dR: tl.tensor,
    heads_R: tl.tensor,
    dims_d: tl.tensor,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Write an unfinished part to scratch, sums in halves: turned whole they would take the memory of a third stage."""
    bits_dR = sums_dR.to(tl.int32, bitcast=True)
    upper_dR = partial_sums + (part * 2 * GROUP + heads_R[None, :]) * WIDTH + dims_d[:, None]
    tl.store(upper_dR, (bits_dR >> 16).to(tl.int16), mask=(heads_R < GROUP)[None, :])
    tl.store(upper_dR + GROUP * WIDTH, bits_dR.to(tl.int16), mask=(heads_R < GROUP)[None, :])
    tl.store(partial_weights + part * 2 * GROUP + heads_R, largest_R, mask=heads_R < GROUP)
    tl.store(partial_weights + (part * 2 + 1) * GROUP + heads_R, total_R, mask=heads_R < GROUP)


@triton.jit
def _place(
    places: tl.tensor, tile: tl.tensor, tokens_L: tl.tensor, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr
) -> tl.tensor:
    """Where a planned tile lies: one number, or each token's block where a tile spans several."""
    if TILE > BLOCK_SIZE:
        place = tl.load(places + tile * (TILE // BLOCK_SIZE) + tokens_L // BLOCK_SIZE)
    else:
        place = tl.load(places + tile)
    return place


@triton.jit
def _slots(
    place: tl.tensor,
    head: tl.tensor,
    tokens_L: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Slots of a tile's tokens in a cache [N, K, S], as the first one and what to add: 64 bits only where needed."""
    if TILE > BLOCK_SIZE:
        offset = head * BLOCK_SIZE
        slots_L = place.to(tl.int64) * (NUM_KV_HEADS * BLOCK_SIZE) + tokens_L % BLOCK_SIZE
    else:
        block = (place // (BLOCK_SIZE // TILE)).to(tl.int64)
        offset = (block * NUM_KV_HEADS + head) * BLOCK_SIZE + (place % (BLOCK_SIZE // TILE)) * TILE
        slots_L = tokens_L
    return offset, slots_L
