"""What `top_k`, `top_p` and `min_p` leave of each row of logits, as a threshold: nothing is sorted, copied or marked.

In the order of `engine.sampler`, larger logits first and equal ones by ascending id, every filter keeps the first so
many tokens. So a row's filters are a logit (as an integer that orders like it) and, of the tokens with that very logit,
the last id that is kept. The kept tokens are the sampler's, ties included: weights are exponentials in float64 of
float32 differences, sums are float64. Only a sum that comes within some 1e-12 of its bound may end a token apart.

A program takes a row and reads it several times: its range; for top_k and for top_p each four to nine passes, of which
each measures the quarters of a bracket and keeps the one that holds the threshold, until all that is left is one logit;
a sum for top_p; equal logits are counted off in one more pass where only some are kept. Rows without a filter return at
once.

Bound: memory. 1,024 filtered rows of 128,256 tokens in float32, 131 us a pass at 4 TB/s: about 1 ms for top_p, 2 ms
for both, in a step of 70 ms. One row alone is bound by one multiprocessor, some 10 us a pass. Tiles without a token of
the bracket are not weighed.

Legend: K rows, V vocabulary, N tokens of a tile.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.gpu.row_launch import check_argument
from engine.kernels.gpu.threshold_search import ordered_keys, range_of, search, tile_of, value_of, weights_of
from engine.sampling_table import MIN_TEMPERATURE

_TILE = 2048
_WARPS = 16

_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
_SMALLEST_WEIGHT = tl.constexpr(1e-300)
_LOWEST_KEY = tl.constexpr(-(2**31))
_NO_ID = tl.constexpr(2**31 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """A row keeps tokens whose key is above its `keys`, and those with that key up to its `last_ids`; [K] int32.

    `by_rank` is 1 for rows with top_k or top_p, whose equal scores the sampler orders by logit before it does by id.
    """

    keys: Tensor
    last_ids: Tensor
    by_rank: Tensor


def thresholds(
    logits_KV: Tensor,
    temperatures_K: Tensor,
    top_k_K: Tensor | None = None,
    top_p_K: Tensor | None = None,
    min_p_K: Tensor | None = None,
) -> Thresholds:
    """What each row's filters keep; a filter is off for a row with top_k 0, top_p 1, min_p 0, for all with None.

    Rows whose temperature is below MIN_TEMPERATURE are not filtered.
    """
    num_rows, vocab_size = check_logits(logits_KV)
    floats = torch.float64, torch.float32
    check_argument("temperatures_K", temperatures_K, (num_rows,), *floats)
    for name, given_K, dtypes in (
        ("top_k_K", top_k_K, (torch.int64, torch.int32)),
        ("top_p_K", top_p_K, floats),
        ("min_p_K", min_p_K, floats),
    ):
        if given_K is not None:
            check_argument(name, given_K, (num_rows,), *dtypes)
    keys_K, last_ids_K, by_rank_K = torch.empty(3, num_rows, dtype=torch.int32, device=logits_KV.device)
    if num_rows:
        threshold_kernel[(num_rows,)](
            logits_KV,
            temperatures_K,
            temperatures_K if top_k_K is None else top_k_K,
            temperatures_K if top_p_K is None else top_p_K,
            temperatures_K if min_p_K is None else min_p_K,
            keys_K,
            last_ids_K,
            by_rank_K,
            vocab_size,
            logits_KV.stride(0),
            HAS_TOP_K=top_k_K is not None,
            HAS_TOP_P=top_p_K is not None,
            HAS_MIN_P=min_p_K is not None,
            TILE=_TILE,
            num_warps=_WARPS,
        )
    return Thresholds(keys=keys_K, last_ids=last_ids_K, by_rank=by_rank_K)


def check_logits(logits_KV: Tensor) -> tuple[int, int]:
    """K and V; rows may lie further apart than V, as those of a padded vocabulary do."""
    if logits_KV.dim() != 2 or logits_KV.stride(1) != 1 or not 0 < logits_KV.shape[1] < 2**30:
        raise ConfigError(
            f"logits_KV have shape {tuple(logits_KV.shape)} and strides {logits_KV.stride()}: rows of neighbouring "
            "logits are right."
        )
    if logits_KV.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"logits_KV are {logits_KV.dtype}: float32, bfloat16 or float16 is right.")
    return logits_KV.shape[0], logits_KV.shape[1]


@triton.jit(do_not_specialize=["temperatures", "top_ks", "top_ps", "min_ps", "keys", "last_ids", "by_rank"])
def threshold_kernel(
    logits: tl.tensor,
    temperatures: tl.tensor,
    top_ks: tl.tensor,
    top_ps: tl.tensor,
    min_ps: tl.tensor,
    keys: tl.tensor,
    last_ids: tl.tensor,
    by_rank: tl.tensor,
    vocab_size: tl.tensor,
    row_stride: tl.tensor,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """The threshold of one row."""
    row = tl.program_id(0)
    row_logits = logits + row * tl.cast(row_stride, tl.int64)
    temperature = tl.load(temperatures + row).to(tl.float32)
    top_k = tl.cast(0, tl.int64)
    top_p = tl.cast(1.0, tl.float64)
    min_p = tl.cast(0.0, tl.float64)
    if HAS_TOP_K:
        top_k = tl.load(top_ks + row).to(tl.int64)
    if HAS_TOP_P:
        top_p = tl.load(top_ps + row).to(tl.float64)
    if HAS_MIN_P:
        min_p = tl.load(min_ps + row).to(tl.float64)
    key = tl.cast(_LOWEST_KEY, tl.int32)
    last_id = tl.cast(_NO_ID, tl.int32)
    if (temperature >= _MIN_TEMPERATURE) & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0)):
        lowest, best, num_finite = range_of(row_logits, vocab_size, TILE)
        best_key = ordered_keys(best)
        best_score = tl.div_rn(best, temperature)
        # Of the tokens with the threshold's logit the first `num_kept` are kept; there are `num_equal`.
        num_kept, num_equal = tl.cast(1, tl.int32), tl.cast(0, tl.int32)
        is_cut = top_k < num_finite
        if (top_k > 0) & is_cut:
            key, above, num_equal = search(
                row_logits,
                vocab_size,
                temperature,
                best_score,
                top_k.to(tl.float64),
                ordered_keys(lowest),
                best_key,
                False,
                TILE,
            )
            num_kept = (top_k - above.to(tl.int64)).to(tl.int32)
        if top_p < 1.0:
            key, num_kept, num_equal = _cut_by_mass(
                row_logits,
                vocab_size,
                temperature,
                best,
                best_score,
                lowest,
                top_p,
                key,
                num_kept,
                num_equal,
                TILE,
            )
        if min_p > 0.0:
            floor = _least_probable(temperature, best_key, best_score, min_p, (top_k > 0) | (top_p < 1.0))
            if floor > key:
                key, num_kept, num_equal = floor, tl.cast(1, tl.int32), tl.cast(0, tl.int32)
        if num_kept < num_equal:
            last_id = _nth_equal(row_logits, vocab_size, key, num_kept, TILE)
    tl.store(keys + row, key)
    tl.store(last_ids + row, last_id)
    tl.store(by_rank + row, ((top_k > 0) | (top_p < 1.0)).to(tl.int32))


@triton.jit
def _cut_by_mass(
    row_logits: tl.tensor,
    vocab_size: tl.tensor,
    temperature: tl.tensor,
    best: tl.tensor,
    best_score: tl.tensor,
    lowest: tl.tensor,
    top_p: tl.tensor,
    key: tl.tensor,
    num_kept: tl.tensor,
    num_equal: tl.tensor,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The threshold of the first tokens that have a share `top_p` of the mass, of those that another one leaves."""
    masses_N = tl.zeros((TILE,), tl.float64)
    for start in tl.range(0, vocab_size, TILE, num_stages=6):
        logits_N = tile_of(row_logits, start + tl.arange(0, TILE), vocab_size)
        is_above_N = (ordered_keys(logits_N) > key) & (logits_N > float("-inf"))
        masses_N += tl.where(is_above_N, weights_of(logits_N, temperature, best_score), 0.0)
    mass_above = tl.sum(masses_N, axis=0)
    # Without a threshold so far its key is below all others, and nothing has it.
    num_at = tl.minimum(num_kept, num_equal)
    weight = tl.where(num_at > 0, weights_of(value_of(key), temperature, best_score), 0.0)
    total = mass_above + num_at.to(tl.float64) * weight
    target = top_p * total
    above = mass_above
    if mass_above >= target:
        # All tokens that weigh less than this come to half of what may be missing, so none of them is the threshold.
        least = 0.5 * (1.0 - top_p) * total / vocab_size
        margin = 1e-3 * temperature + 1e-6 * tl.abs(best)
        floor = best + temperature * tl.log(least).to(tl.float32) - margin
        floor = ordered_keys(tl.maximum(floor, lowest))
        low = tl.minimum(tl.where(floor > key, floor, key + 1), ordered_keys(best))
        key, above, num_equal = search(
            row_logits, vocab_size, temperature, best_score, target, low, ordered_keys(best), True, TILE
        )
        num_at = num_equal
    weight = tl.maximum(weights_of(value_of(key), temperature, best_score), _SMALLEST_WEIGHT)
    needed = tl.maximum(tl.ceil((target - above) / weight), 1.0)
    return key, tl.minimum(needed, num_at.to(tl.float64)).to(tl.int32), num_equal


@triton.jit
def _least_probable(
    temperature: tl.tensor, best_key: tl.tensor, best_score: tl.tensor, min_p: tl.tensor, is_filtered: tl.tensor
) -> tl.tensor:
    """The smallest key that `min_p` keeps, found without the logits. The sampler compares probabilities where it orders
    tokens by them, and float32 scores where `min_p` is all there is.
    """
    floor = best_score + tl.log(min_p.to(tl.float32).to(tl.float64)).to(tl.float32)
    low, high = tl.cast(_LOWEST_KEY, tl.int64) + 0x7FFFFF, best_key.to(tl.int64)  # minus infinity, never kept
    while low + 1 < high:
        middle = (low + high) >> 1
        value = value_of(middle.to(tl.int32))
        by_score = tl.div_rn(value, temperature) >= floor
        by_weight = weights_of(value, temperature, best_score) >= min_p
        if tl.where(is_filtered, by_weight, by_score):
            high = middle
        else:
            low = middle
    return high.to(tl.int32)


@triton.jit
def _nth_equal(
    row_logits: tl.tensor, vocab_size: tl.tensor, key: tl.tensor, number: tl.tensor, TILE: tl.constexpr
) -> tl.tensor:
    """The id of the token that is the `number`-th, from 1, to have this key."""
    found = tl.cast(_NO_ID, tl.int32)
    num_seen = tl.cast(0, tl.int32)
    for start in tl.range(0, vocab_size, TILE, num_stages=6):
        ids_N = start + tl.arange(0, TILE)
        is_equal_N = ordered_keys(tile_of(row_logits, ids_N, vocab_size)) == key
        num_here = tl.sum(is_equal_N.to(tl.int32), axis=0)
        if (num_seen < number) & (num_seen + num_here >= number):
            is_past_N = is_equal_N & (tl.cumsum(is_equal_N.to(tl.int32), axis=0) + num_seen >= number)
            found = tl.min(tl.where(is_past_N, ids_N, _NO_ID), axis=0)
        num_seen += num_here
    return found
