"""Splits fused queries, keys and values, normalises heads where the model does, rotates, and writes the paged cache.

As `engine.kernels.fused.rotate_and_write` and `normalise_rotate_and_write`, in one pass without an intermediate. What
is cached is finite and within the cache's dtype (`reference.write_kv` says why). A padded token, whose slot is -1 or
beyond the cache, writes nothing; its query is computed like any other, and is zero where its position has no angles.

Bound: memory. Llama-3-8B, 2,048 tokens of 6,144 bfloat16 columns: 25.2 MB read, 16.8 MB of queries and 8.4 MB of keys
and values written, 1 MB of angles: 51 MB, 12.9 us at 4 TB/s. One program takes all heads of a token (of several tokens
where a rank has few heads) as two halves of a head, so that an element and its partner are in one thread, 8 elements
and thereby 16 bytes at a time; angles are read once for the heads that a thread has.

Legend: T tokens, H query heads, K key/value heads, d elements of a head, h = d / 2, M positions, F = (H + 2 K) d;
U tokens of a program; G query or key/value heads, padded to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.gpu.narrowing import LARGEST_E4M3, narrow
from engine.kernels.gpu.row_launch import check_argument, check_floating, limited, stages_of
from engine.kernels.reference import LARGEST_CACHED

# Query elements of a program at least, and of a warp: a thread has 32 of each half, and then 8 of keys and of values.
_QUERY_TILE = 4096
_ELEMENTS_PER_WARP = 2048
_MAX_WARPS = 8


def rotate_and_write(
    qkv_TF: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    keys: Tensor,
    values: Tensor,
    table_Md: Tensor,
    *,
    num_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    epsilon: float = 0.0,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    query_THd: Tensor | None = None,
    num_ctas: int | None = None,
) -> Tensor:
    """Rotated queries [T, H, d]; keys / key_scale and values / value_scale go to their slots, block id * S + offset.

    `keys` and `values` are [N, K, S, d], of the activations' dtype, another float or float8_e4m3fn; the weights [d]
    are of the query and key norms, both or neither.
    """
    query_THd = _checked(qkv_TF, positions_T, slots_T, keys, values, table_Md, num_heads, query_THd)
    if (q_weight is None) != (k_weight is None):
        raise ConfigError("Only one of q_weight and k_weight was given: queries and keys are normalised both or not.")
    for name, weight_d in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight_d is not None:
            check_argument(name, weight_d, (keys.shape[3],), qkv_TF.dtype)
    num_tokens, (num_blocks, num_kv_heads, block_size, head_dim) = len(qkv_TF), keys.shape
    tokens_per_program = tokens_of_a_program(num_heads, head_dim)
    num_groups = -(-num_tokens // tokens_per_program)
    num_programs = limited(num_groups, num_ctas)
    if num_programs:
        largest = LARGEST_E4M3 if keys.dtype is torch.float8_e4m3fn else torch.finfo(keys.dtype).max
        rotate_and_write_kernel[(num_programs,)](
            qkv_TF,
            positions_T,
            slots_T,
            keys,
            values,
            table_Md,
            qkv_TF if q_weight is None else q_weight,
            qkv_TF if k_weight is None else k_weight,
            query_THd,
            num_tokens,
            table_Md.shape[0],
            num_blocks * block_size,
            epsilon,
            key_scale,
            value_scale,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            BLOCK_SIZE=block_size,
            HEAD_DIM=head_dim,
            LARGEST=min(LARGEST_CACHED, largest),
            NORMALISES=q_weight is not None,
            TOKENS=tokens_per_program,
            QUERY_HEADS=_power_of_two(num_heads),
            KV_HEADS=_power_of_two(num_kv_heads),
            STAGES=stages_of(num_groups, num_programs, tokens_per_program * qkv_TF.stride(0) * qkv_TF.itemsize),
            num_warps=warps_of_a_program(num_heads, head_dim),
        )
    return query_THd


def tokens_of_a_program(num_heads: int, head_dim: int) -> int:
    """As many as give every thread a few loads of 16 bytes, a power of two."""
    return max(1, _QUERY_TILE // (_power_of_two(num_heads) * head_dim))


def warps_of_a_program(num_heads: int, head_dim: int) -> int:
    """Two, or more where one token has more than a tile."""
    num_elements = tokens_of_a_program(num_heads, head_dim) * _power_of_two(num_heads) * head_dim
    return min(_MAX_WARPS, num_elements // _ELEMENTS_PER_WARP)


def _power_of_two(count: int) -> int:
    """The next one."""
    return 1 << (count - 1).bit_length()


def _checked(
    qkv_TF: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    keys: Tensor,
    values: Tensor,
    table_Md: Tensor,
    num_heads: int,
    query_THd: Tensor | None,
) -> Tensor:
    """The given queries, or new ones."""
    check_floating("qkv_TF", qkv_TF, 2)
    if keys.dim() != 4:
        raise ConfigError(f"keys have shape {tuple(keys.shape)}: blocks, heads, slots and elements are right.")
    _, num_kv_heads, block_size, head_dim = keys.shape
    caches = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
    check_argument("keys", keys, tuple(keys.shape), *caches)
    check_argument("values", values, tuple(keys.shape), keys.dtype)
    if head_dim < 16 or head_dim & (head_dim - 1) or block_size & (block_size - 1):
        raise ConfigError(f"keys have {block_size} slots of {head_dim} elements: powers of two are right, from 16 on.")
    num_tokens = qkv_TF.shape[0]
    check_argument("qkv_TF", qkv_TF, (num_tokens, (num_heads + 2 * num_kv_heads) * head_dim))
    check_argument("positions_T", positions_T, (num_tokens,), torch.int32, torch.int64)
    check_argument("slots_T", slots_T, (num_tokens,), torch.int32, torch.int64)
    check_argument("table_Md", table_Md, (table_Md.shape[0], head_dim), torch.float32)
    if query_THd is None:
        query_THd = qkv_TF.new_empty(num_tokens, num_heads, head_dim)
    check_argument("query_THd", query_THd, (num_tokens, num_heads, head_dim), qkv_TF.dtype)
    return query_THd


@triton.jit(do_not_specialize=["positions", "slots", "num_tokens", "num_positions", "num_slots"])
def rotate_and_write_kernel(
    qkv: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    query_weight: tl.tensor,
    key_weight: tl.tensor,
    query: tl.tensor,
    num_tokens: tl.tensor,
    num_positions: tl.tensor,
    num_slots: tl.tensor,
    epsilon: tl.tensor,
    key_scale: tl.tensor,
    value_scale: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LARGEST: tl.constexpr,
    NORMALISES: tl.constexpr,
    TOKENS: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Some tokens, and then those as many programs further on."""
    dtype = qkv.dtype.element_ty
    HALF: tl.constexpr = HEAD_DIM // 2
    COLUMNS: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    for group in tl.range(tl.program_id(0), tl.cdiv(num_tokens, TOKENS), tl.num_programs(0), num_stages=STAGES):
        tokens_U = group * TOKENS + tl.arange(0, TOKENS)
        inside_U = tokens_U < num_tokens
        first_U = tokens_U.to(tl.int64) * COLUMNS
        cos_Uh, sin_Uh = _angles(table, positions, tokens_U, inside_U, num_positions, HEAD_DIM)

        query_UG, query_inside_UG = _heads(first_U, inside_U, NUM_HEADS, QUERY_HEADS, HEAD_DIM)
        first_UGh, second_UGh = _halves(qkv, query_UG, query_inside_UG, HALF)
        if NORMALISES:
            first_UGh, second_UGh = _normalised(first_UGh, second_UGh, query_weight, epsilon, dtype, HALF)
        first_UGh, second_UGh = _rotated(first_UGh, second_UGh, cos_Uh, sin_Uh)
        written_UG, _ = _heads(
            tokens_U.to(tl.int64) * (NUM_HEADS * HEAD_DIM), inside_U, NUM_HEADS, QUERY_HEADS, HEAD_DIM
        )
        _store_halves(query, written_UG, query_inside_UG, narrow(first_UGh, dtype), narrow(second_UGh, dtype), HALF)

        key_UG, key_inside_UG = _heads(first_U + NUM_HEADS * HEAD_DIM, inside_U, NUM_KV_HEADS, KV_HEADS, HEAD_DIM)
        first_UGh, second_UGh = _halves(qkv, key_UG, key_inside_UG, HALF)
        value_first_UGh, value_second_UGh = _halves(qkv, key_UG + NUM_KV_HEADS * HEAD_DIM, key_inside_UG, HALF)
        if NORMALISES:
            first_UGh, second_UGh = _normalised(first_UGh, second_UGh, key_weight, epsilon, dtype, HALF)
        first_UGh, second_UGh = _rotated(first_UGh, second_UGh, cos_Uh, sin_Uh)
        # As the layer does, a rotated key has the activations' dtype before the cache's.
        first_UGh = narrow(first_UGh, dtype).to(tl.float32)
        second_UGh = narrow(second_UGh, dtype).to(tl.float32)
        slots_U = tl.load(slots + tokens_U, mask=inside_U, other=-1).to(tl.int64)
        kept_U = (slots_U >= 0) & (slots_U < num_slots)
        tiles_U = (slots_U // BLOCK_SIZE) * (NUM_KV_HEADS * BLOCK_SIZE) + slots_U % BLOCK_SIZE
        cached_UG, cached_inside_UG = _heads(tiles_U * HEAD_DIM, kept_U, NUM_KV_HEADS, KV_HEADS, BLOCK_SIZE * HEAD_DIM)
        stored = keys.dtype.element_ty
        first_UGh = _cacheable(first_UGh, key_scale, LARGEST, stored)
        second_UGh = _cacheable(second_UGh, key_scale, LARGEST, stored)
        _store_halves(keys, cached_UG, cached_inside_UG, first_UGh, second_UGh, HALF)
        first_UGh = _cacheable(value_first_UGh, value_scale, LARGEST, stored)
        second_UGh = _cacheable(value_second_UGh, value_scale, LARGEST, stored)
        _store_halves(values, cached_UG, cached_inside_UG, first_UGh, second_UGh, HALF)


@triton.jit
def _angles(
    table: tl.tensor,
    positions: tl.tensor,
    tokens_U: tl.tensor,
    inside_U: tl.tensor,
    num_positions: tl.tensor,
    HEAD_DIM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Cosines and sines [U, 1, h]; zeros of a position that has none."""
    HALF: tl.constexpr = HEAD_DIM // 2
    positions_U = tl.load(positions + tokens_U, mask=inside_U, other=-1).to(tl.int64)
    known_U11 = ((positions_U >= 0) & (positions_U < num_positions))[:, None, None]
    places_U1h = (positions_U * HEAD_DIM)[:, None, None] + tl.arange(0, HALF)[None, None, :]
    cos_U1h = tl.load(table + places_U1h, mask=known_U11, other=0.0)
    sin_U1h = tl.load(table + places_U1h + HALF, mask=known_U11, other=0.0)
    return cos_U1h, sin_U1h


@triton.jit
def _heads(
    first_U: tl.tensor,
    inside_U: tl.tensor,
    NUM_HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    STRIDE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Where each head of each token begins, [U, G, 1], and whether there is one."""
    heads_G = tl.arange(0, PADDED)
    places_UG = first_U[:, None] + heads_G[None, :] * STRIDE
    inside_UG = inside_U[:, None] & (heads_G < NUM_HEADS)[None, :]
    return places_UG[:, :, None], inside_UG[:, :, None]


@triton.jit
def _halves(
    source: tl.tensor, places_UG1: tl.tensor, inside_UG1: tl.tensor, HALF: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves of every head in float32, [U, G, h] each."""
    places_UGh = places_UG1 + tl.arange(0, HALF)[None, None, :]
    first_UGh = tl.load(source + places_UGh, mask=inside_UG1, other=0.0).to(tl.float32)
    second_UGh = tl.load(source + places_UGh + HALF, mask=inside_UG1, other=0.0).to(tl.float32)
    return first_UGh, second_UGh


@triton.jit
def _store_halves(
    target: tl.tensor,
    places_UG1: tl.tensor,
    inside_UG1: tl.tensor,
    first_UGh: tl.tensor,
    second_UGh: tl.tensor,
    HALF: tl.constexpr,
) -> None:
    places_UGh = places_UG1 + tl.arange(0, HALF)[None, None, :]
    tl.store(target + places_UGh, first_UGh, mask=inside_UG1)
    tl.store(target + places_UGh + HALF, second_UGh, mask=inside_UG1)


@triton.jit
def _normalised(
    first_UGh: tl.tensor,
    second_UGh: tl.tensor,
    weight: tl.tensor,
    epsilon: tl.tensor,
    dtype: tl.constexpr,
    HALF: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Heads over their root mean square, rounded, times the weight, rounded: see `norm`."""
    columns_h = tl.arange(0, HALF)
    first_weight_h = tl.load(weight + columns_h).to(tl.float32)[None, None, :]
    second_weight_h = tl.load(weight + HALF + columns_h).to(tl.float32)[None, None, :]
    squares_UG = tl.sum(first_UGh * first_UGh + second_UGh * second_UGh, axis=2)
    inverse_UG1 = tl.rsqrt(squares_UG / (2 * HALF) + epsilon)[:, :, None]
    first_UGh = narrow(first_UGh * inverse_UG1, dtype).to(tl.float32) * first_weight_h
    second_UGh = narrow(second_UGh * inverse_UG1, dtype).to(tl.float32) * second_weight_h
    return narrow(first_UGh, dtype).to(tl.float32), narrow(second_UGh, dtype).to(tl.float32)


@triton.jit
def _rotated(
    first_UGh: tl.tensor, second_UGh: tl.tensor, cos_U1h: tl.tensor, sin_U1h: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Element i turned against element i + h."""
    return first_UGh * cos_U1h - second_UGh * sin_U1h, second_UGh * cos_U1h + first_UGh * sin_U1h


@triton.jit
def _cacheable(new: tl.tensor, scale: tl.tensor, LARGEST: tl.constexpr, stored: tl.constexpr) -> tl.tensor:
    """What is stored of new keys or values: finite, and zero for what is no number."""
    new = new / scale
    new = tl.where(new == new, new, 0.0)
    return narrow(tl.where(new > LARGEST, LARGEST, tl.where(new < -LARGEST, -LARGEST, new)), stored)
