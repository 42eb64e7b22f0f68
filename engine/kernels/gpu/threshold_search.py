"""Finds the logit of a row from which on larger ones reach a number or a probability mass, without sorting the row.

Logits are compared by keys, integers that order like they do. A bracket of keys begins as all that could be; a pass
over the row measures what its upper quarters hold, and keeps the quarter with the threshold, until the logits in it are
all equal. Quarters are equal in value, because logits are spread evenly in value and not in their bits. Who asks, and
what for, is `sampling_filter`.

Legend: V vocabulary, N tokens of a tile.
"""

import triton
import triton.language as tl

# A bracket of fewer keys is cut evenly in keys.
_FINE = tl.constexpr(2**16)
# Far more than quartering the range of float32 would take; no program may run on.
_MAX_PASSES = tl.constexpr(160)
_LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
_LOWEST_KEY = tl.constexpr(-(2**31))
_HIGHEST_KEY = tl.constexpr(2**31 - 1)


@triton.jit
def ordered_keys(logits: tl.tensor) -> tl.tensor:
    """int32 that order like these float32; both zeros have one key."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key: tl.tensor) -> tl.tensor:
    """The float32 with this key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def tile_of(row_logits: tl.tensor, ids: tl.tensor, vocab_size: tl.tensor) -> tl.tensor:
    """Logits in float32, none of them NaN or positive infinity; beyond the vocabulary minus infinity."""
    logits = tl.load(row_logits + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
    logits = tl.where(logits == logits, logits, float("-inf"))
    return tl.minimum(logits, _LARGEST_FLOAT)


@triton.jit
def weights_of(logits: tl.tensor, temperature: tl.tensor, best_score: tl.tensor) -> tl.tensor:
    """Probabilities relative to that of the best token, float64."""
    return tl.exp((tl.div_rn(logits, temperature) - best_score).to(tl.float64))


@triton.jit
def range_of(
    row_logits: tl.tensor, vocab_size: tl.tensor, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The smallest finite and the largest logit, and how many are finite."""
    lowest_N = tl.full((TILE,), _LARGEST_FLOAT, tl.float32)
    best_N = tl.full((TILE,), -_LARGEST_FLOAT, tl.float32)
    finite_N = tl.zeros((TILE,), tl.int32)
    for start in tl.range(0, vocab_size, TILE, num_stages=6):
        logits_N = tile_of(row_logits, start + tl.arange(0, TILE), vocab_size)
        is_finite_N = logits_N > float("-inf")
        lowest_N = tl.minimum(lowest_N, tl.where(is_finite_N, logits_N, _LARGEST_FLOAT))
        best_N = tl.maximum(best_N, logits_N)
        finite_N += is_finite_N.to(tl.int32)
    best = tl.max(best_N, axis=0)
    return tl.minimum(tl.min(lowest_N, axis=0), best), best, tl.sum(finite_N, axis=0)


@triton.jit
def search(
    row_logits: tl.tensor,
    vocab_size: tl.tensor,
    temperature: tl.tensor,
    best_score: tl.tensor,
    target: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    WEIGHS: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The largest key, of `low` .. `high`, such that tokens with it or a larger one measure at least `target`: their
    number or, where it WEIGHS, their mass. Also what those above it measure, and how many have it.
    """
    above = tl.cast(0.0, tl.float64)  # what the keys beyond `high` measure
    key, num_equal = low, tl.cast(0, tl.int32)
    passes = tl.cast(0, tl.int32)
    while passes < _MAX_PASSES:
        second, third, fourth = _pivot(low, high, 1), _pivot(low, high, 2), _pivot(low, high, 3)
        lowest, highest, num_inside, from_second, from_third, from_fourth = _measure(
            row_logits, vocab_size, temperature, best_score, low, second, third, fourth, high, WEIGHS, TILE
        )
        if lowest >= highest:  # one logit is left, or rounding has left none
            key = tl.where(num_inside > 0, highest, low)
            num_equal = num_inside
            passes = tl.cast(_MAX_PASSES, tl.int32)
        else:
            low, high = tl.maximum(low, lowest), tl.minimum(high, highest)
            if above + from_fourth >= target:
                low = tl.maximum(low, fourth)
            elif above + from_third >= target:
                low, high, above = tl.maximum(low, third), tl.minimum(high, fourth - 1), above + from_fourth
            elif above + from_second >= target:
                low, high, above = tl.maximum(low, second), tl.minimum(high, third - 1), above + from_third
            else:
                high, above = tl.minimum(high, second - 1), above + from_second
            key = low
            passes += 1
    return key, above, num_equal


@triton.jit
def _pivot(low: tl.tensor, high: tl.tensor, part: tl.constexpr) -> tl.tensor:
    """The first key of a quarter of a bracket, by value or, of a narrow one, by key."""
    span = high.to(tl.int64) - low.to(tl.int64) + 1
    by_key = (low.to(tl.int64) + span * part // 4).to(tl.int32)
    first, last = value_of(low).to(tl.float64), value_of(high).to(tl.float64)
    by_value = ordered_keys((first + (last - first) * (part * 0.25)).to(tl.float32))
    return tl.where(span < _FINE, by_key, tl.minimum(tl.maximum(by_value, low + 1), high))


@triton.jit
def _measure(
    row_logits: tl.tensor,
    vocab_size: tl.tensor,
    temperature: tl.tensor,
    best_score: tl.tensor,
    low: tl.tensor,
    second: tl.tensor,
    third: tl.tensor,
    fourth: tl.tensor,
    high: tl.tensor,
    WEIGHS: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """One pass over a row: the smallest and the largest key of the bracket, how many are in it, and what those from
    the second, third and fourth pivot on measure.
    """
    lowest_N = tl.full((TILE,), _HIGHEST_KEY, tl.int32)
    highest_N = tl.full((TILE,), _LOWEST_KEY, tl.int32)
    inside_N = tl.zeros((TILE,), tl.int32)
    second_N, third_N, fourth_N = (
        tl.zeros((TILE,), tl.float64),
        tl.zeros((TILE,), tl.float64),
        tl.zeros((TILE,), tl.float64),
    )
    for start in tl.range(0, vocab_size, TILE, num_stages=6):
        logits_N = tile_of(row_logits, start + tl.arange(0, TILE), vocab_size)
        keys_N = ordered_keys(logits_N)
        is_inside_N = (keys_N >= low) & (keys_N <= high) & (logits_N > float("-inf"))
        if tl.max(is_inside_N.to(tl.int32), axis=0) > 0:
            lowest_N = tl.minimum(lowest_N, tl.where(is_inside_N, keys_N, _HIGHEST_KEY))
            highest_N = tl.maximum(highest_N, tl.where(is_inside_N, keys_N, _LOWEST_KEY))
            inside_N += is_inside_N.to(tl.int32)
            if WEIGHS:
                weights_N = tl.where(is_inside_N, weights_of(logits_N, temperature, best_score), 0.0)
            else:
                weights_N = is_inside_N.to(tl.float64)
            second_N += tl.where(keys_N >= second, weights_N, 0.0)
            third_N += tl.where(keys_N >= third, weights_N, 0.0)
            fourth_N += tl.where(keys_N >= fourth, weights_N, 0.0)
    return (
        tl.min(lowest_N, axis=0),
        tl.max(highest_N, axis=0),
        tl.sum(inside_N, axis=0),
        tl.sum(second_N, axis=0),
        tl.sum(third_N, axis=0),
        tl.sum(fourth_N, axis=0),
    )
