"""The memory-bound parts of a layer as functions of tensors alone, each of which a compiler makes one or two loops of.

They compute what the operations in `engine.layers` and `reference` compute, without loops over sequences and without
branches on values, so that `compiled` can export them once for every batch size. Legend: as in `reference`; E hidden,
F columns, h = d / 2 frequencies, M positions.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from engine.kernels import packed
from engine.kernels.reference import LARGEST_CACHED

# Neighbouring ids whose maximum is found before its place.
_CHUNK = 64


def add(first: Tensor, second: Tensor) -> Tensor:
    """The sum of two tensors of one shape."""
    return first + second


def linear(input_TI: Tensor, packed_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """[T, I] -> [T, O], with a weight that was packed; see `engine.kernels.packed`."""
    output_TO: Tensor = packed.linear(input_TI, packed_OI, bias_O)
    return output_TO


def rms_norm(hidden_TE: Tensor, weight_E: Tensor, *, epsilon: float) -> Tensor:
    """Divide the last dimension by its root mean square: [..., E] -> [..., E]; see `engine.layers.norm`."""
    if hidden_TE.dtype in (torch.float16, torch.bfloat16):
        # With the weight inside, the fused kernel would round once where transformers rounds twice.
        return weight_E * functional.rms_norm(hidden_TE, weight_E.shape, None, epsilon)
    return functional.rms_norm(hidden_TE, weight_E.shape, weight_E, epsilon)


def silu_and_mul(gate_up_TF: Tensor) -> Tensor:
    """silu of the first F columns times the others: [T, 2 F] -> [T, F]."""
    gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
    return functional.silu(gate_TF) * up_TF


def rotate_and_write(
    qkv_TF: Tensor, positions_T: Tensor, slots_T: Tensor, keys: Tensor, values: Tensor, table_Md: Tensor
) -> Tensor:
    """Rotated queries [T, H, d]; rotated keys and the values go to their slots of the cache, in place."""
    query_THd, key_TKd, value_TKd = _split(qkv_TF, keys)
    cos_T1h, sin_T1h = table_Md[positions_T][:, None].chunk(2, dim=-1)
    _write(rotate(key_TKd, cos_T1h, sin_T1h), value_TKd, slots_T, keys, values)
    return rotate(query_THd, cos_T1h, sin_T1h)


def normalise_rotate_and_write(
    qkv_TF: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    keys: Tensor,
    values: Tensor,
    table_Md: Tensor,
    query_weight_d: Tensor,
    key_weight_d: Tensor,
    *,
    epsilon: float,
) -> Tensor:
    """As `rotate_and_write`, with the root mean square of each query and key head divided out first."""
    query_THd, key_TKd, value_TKd = _split(qkv_TF, keys)
    query_THd = rms_norm(query_THd, query_weight_d, epsilon=epsilon)
    key_TKd = rms_norm(key_TKd, key_weight_d, epsilon=epsilon)
    cos_T1h, sin_T1h = table_Md[positions_T][:, None].chunk(2, dim=-1)
    _write(rotate(key_TKd, cos_T1h, sin_T1h), value_TKd, slots_T, keys, values)
    return rotate(query_THd, cos_T1h, sin_T1h)


def decode_attention(
    query_DHd: Tensor, keys: Tensor, values: Tensor, block_tables_DB: Tensor, lengths_D: Tensor, *, scale: float
) -> Tensor:
    """As `reference.decode_attention` without a window: [D, H, d]. Tiles are read where they lie.

    The heads of a group, and parts of a head, are sums of their own with the same bounds, which the compiler computes
    in one loop: it then reads a key or value once for all of them, and adds to several registers in turn.
    """
    num_kv_heads, block_size, head_dim = keys.shape[1:]
    num_sequences, num_heads = query_DHd.shape[:2]
    group_size = num_heads // num_kv_heads
    wide = torch.float64 if keys.dtype is torch.float64 else torch.float32
    query_D1KG1d = query_DHd.view(num_sequences, 1, num_kv_heads, group_size, 1, head_dim).to(wide)
    positions_BS = torch.arange(block_tables_DB.shape[1] * block_size, device=keys.device).view(-1, block_size)
    visible_DB1S = (positions_BS < lengths_D[:, None, None])[:, :, None]
    keys_DBKSd, values_DBKSd = keys[block_tables_DB].to(wide), values[block_tables_DB].to(wide)
    width = head_dim // _num_parts(head_dim, group_size)
    outputs: list[Tensor] = []
    for head in range(group_size):
        scores_DBKS = (query_D1KG1d[:, :, :, head] * keys_DBKSd).sum(-1) * scale
        scores_DBKS = scores_DBKS.where(visible_DB1S, float("-inf"))
        weights_DBKS = (scores_DBKS - scores_DBKS.amax((1, 3), keepdim=True)).exp()
        parts = [(weights_DBKS[..., None] * part).sum((1, 3)) for part in torch.split(values_DBKSd, width, dim=-1)]
        outputs.append(torch.cat(parts, dim=-1) / weights_DBKS.sum((1, 3))[..., None])
    return torch.stack(outputs, dim=2).view_as(query_DHd).to(query_DHd.dtype)


def _num_parts(head_dim: int, group_size: int) -> int:
    """How many parts of a head are summed side by side: of 32 elements, and no more sums than registers hold."""
    fits = (parts for parts in (4, 2) if head_dim % (32 * parts) == 0 and group_size * parts <= 8)
    return next(fits, 1)


def attend_tiles(
    query_QHd: Tensor,
    keys: Tensor,
    values: Tensor,
    rows_Un: Tensor,
    tiles_UB: Tensor,
    limits_Un: Tensor,
    output_QHd: Tensor,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attention of some rows of queries, into their places of the output; see `engine.kernels.prefill.Group`.

    Query heads of a group are rows of one product. Scores are products in float32; those of bfloat16 blocks let oneDNN
    take the factors as bfloat16, which they are, and so lose nothing. Their weights, at most one, are rounded to
    bfloat16 before they meet the values, as FlashAttention does (Dao et al. 2022). Returns nothing of use.
    """
    num_units, num_queries = rows_Un.shape
    num_kv_heads, _, head_dim = keys.shape[1:]
    group_size = query_QHd.shape[1] // num_kv_heads
    wide = torch.float32 if keys.element_size() <= 2 else keys.dtype
    narrow = keys.dtype if keys.dtype is torch.bfloat16 and has_bfloat16_products() else wide
    query_UnGd = query_QHd.view(-1, group_size, head_dim)[rows_Un].to(wide)
    query_UMd = query_UnGd.transpose(1, 2).reshape(num_units, -1, head_dim)
    keys_ULd, values_ULd = (
        _tiles(cache, tiles_UB).to(dtype).view(num_units, -1, head_dim)
        for cache, dtype in ((keys, wide), (values, narrow))
    )
    scores_UGnL = torch.bmm(query_UMd, keys_ULd.transpose(1, 2)).view(num_units, group_size, num_queries, -1) * scale
    positions_L = torch.arange(keys_ULd.shape[1], device=keys.device)
    visible_U1nL = positions_L < limits_Un[:, None, :, None]
    if window is not None:
        visible_U1nL = visible_U1nL & (positions_L >= limits_Un[:, None, :, None] - window)
    weights_UGnL = scores_UGnL.where(visible_U1nL, float("-inf")).softmax(-1).to(narrow)
    attended_UMd = torch.bmm(weights_UGnL.view(num_units, group_size * num_queries, -1), values_ULd)
    attended_UnGd = attended_UMd.view(num_units, group_size, num_queries, head_dim).transpose(1, 2)
    output_QHd.view(-1, group_size, head_dim)[rows_Un] = attended_UnGd.to(output_QHd.dtype)
    return limits_Un.new_zeros(1)


def _tiles(cache: Tensor, tiles_UB: Tensor) -> Tensor:
    """[N, K, S, d] -> [U, B, S, d]; FP8 is copied as bytes, see `reference`."""
    stored = cache.view(torch.uint8) if cache.element_size() == 1 else cache
    return stored.view(-1, *cache.shape[2:])[tiles_UB].view(cache.dtype)


@functools.cache
def has_bfloat16_products() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def best_token_ids(logits_TV: Tensor) -> Tensor:
    """As `engine.sampler.best_token_ids`: [T] int64."""
    if logits_TV.shape[1] % _CHUNK:
        return logits_TV.float().argmax(-1)
    chunks_TNC = logits_TV.float().view(logits_TV.shape[0], -1, _CHUNK)
    chunk_T = chunks_TNC.amax(-1).argmax(-1)
    rows_T = torch.arange(logits_TV.shape[0], device=logits_TV.device)
    return chunk_T * _CHUNK + chunks_TNC[rows_T, chunk_T].argmax(-1)


def rotate(input_TNd: Tensor, cos_T1h: Tensor, sin_T1h: Tensor) -> Tensor:
    """Rotate element i of a head against element i + h, in the table's precision; keeps the input's dtype."""
    first_TNh, second_TNh = input_TNd.to(cos_T1h.dtype).chunk(2, dim=-1)
    turned_TNd = torch.cat(
        (first_TNh * cos_T1h - second_TNh * sin_T1h, second_TNh * cos_T1h + first_TNh * sin_T1h), dim=-1
    )
    return turned_TNd.to(input_TNd.dtype)


def _split(qkv_TF: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fused columns as heads of queries, keys and values: [T, H, d], [T, K, d], [T, K, d]."""
    num_kv_heads, _, head_dim = keys.shape[1:]
    heads_TNd = qkv_TF.view(qkv_TF.shape[0], -1, head_dim)
    num_heads = heads_TNd.shape[1] - 2 * num_kv_heads
    query_THd, key_TKd, value_TKd = torch.split(heads_TNd, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    return query_THd, key_TKd, value_TKd


def _write(key_TKd: Tensor, value_TKd: Tensor, slots_T: Tensor, keys: Tensor, values: Tensor) -> None:
    """See `reference.write_kv`."""
    block_size = keys.shape[2]
    blocks_T, offsets_T = slots_T // block_size, slots_T % block_size
    largest = min(LARGEST_CACHED, torch.finfo(keys.dtype).max)
    for cache, new_TKd in ((keys, key_TKd), (values, value_TKd)):
        number_TKd = new_TKd.where(new_TKd == new_TKd, 0.0)  # not nan_to_num, which becomes a loop over elements
        cache[blocks_T, :, offsets_T] = number_TKd.clamp(-largest, largest)
