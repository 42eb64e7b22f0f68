"""Draws one token for every row of logits: the best one, or Gumbel-max with a temperature, rows of both kinds mixed.

As `engine.sampler`: the token with the largest logit / temperature + noise, float32; of equal scores the lowest id.
Which tokens a row may draw (`top_k`, `top_p`, `min_p`) `sampling_filter` says beforehand, as a threshold. Biases, bans,
penalties and log-probabilities touch few logits or few rows, and stay what they are in `engine.sampler`.

Bound: memory, one pass over the logits. 1,024 rows of Llama-3's 128,256 tokens: 525 MB in float32, 131 us at 4 TB/s;
263 MB in bfloat16, 66 us. Approximate noise for every token is some 45 instructions: 131 M tokens are 0.2 ms of all
multiprocessors; exact noise would be ten times that. So a tile makes none if its best logit with the largest possible
noise stays behind the best score so far (most tiles of a real model do); else approximate noise; and exact scores only
for tokens whose approximate ones come within the error of the best: one or two in each of the few tiles that hold a new
best. The result is that of exact scores throughout.

Tiles are 4,096 tokens, 256 threads of 16, and one is loaded ahead. Programs are rows times splits of the vocabulary, so
that a few rows fill the device too; another kernel merges the splits. The grid follows from sizes alone.

Legend: K rows, V vocabulary, S splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.gpu.gumbel_noise import (
    LARGEST_NOISE,
    NOISE_ERROR,
    approximate_noise,
    exact_noise,
    row_keys,
    uniform,
)
from engine.kernels.gpu.row_launch import check_argument
from engine.kernels.gpu.sampling_filter import Thresholds, check_logits, thresholds
from engine.kernels.gpu.threshold_search import ordered_keys
from engine.sampling_table import MIN_TEMPERATURE

_TILE = 4096
_WARPS = 8
# Programs wanted: 8 of 256 threads fill each of an H200's 132 multiprocessors.
_NUM_PROGRAMS = 1056

_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
_LARGEST_NOISE = tl.constexpr(LARGEST_NOISE)
_NOISE_ERROR = tl.constexpr(NOISE_ERROR)
# Of a quotient by a fast division and a sum, relative to a score: a few steps of 2**-24.
_SCORE_ERROR = tl.constexpr(2.0**-20)
_NO_ID = tl.constexpr(2**31 - 1)
_LOWEST_KEY = tl.constexpr(-(2**31))


def best_tokens(logits_KV: Tensor, output_K: Tensor | None = None, *, num_splits: int | None = None) -> Tensor:
    """The id of each row's largest logit, of equal ones the lowest: [K] int64. NaN counts as the smallest."""
    check_logits(logits_KV)
    return _draw(logits_KV, None, None, output_K, num_splits)


def draw_tokens(
    logits_KV: Tensor,
    seeds_K: Tensor,
    positions_K: Tensor,
    temperatures_K: Tensor,
    *,
    top_k_K: Tensor | None = None,
    top_p_K: Tensor | None = None,
    min_p_K: Tensor | None = None,
    output_K: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """One token per row, [K] int64 (or as `output_K`), whose draw is the hash of its seed, position and id.

    Rows whose temperature is below MIN_TEMPERATURE get their best token. A filter that is None filters no row; within
    it a row has it off with top_k 0, top_p 1, min_p 0. Integers are int32 or int64, the others float32 or float64.
    """
    num_rows, _ = check_logits(logits_KV)
    for name, integers_K in (("seeds_K", seeds_K), ("positions_K", positions_K)):
        check_argument(name, integers_K, (num_rows,), torch.int64, torch.int32)
    check_argument("temperatures_K", temperatures_K, (num_rows,), torch.float32, torch.float64)
    kept = None
    if top_k_K is not None or top_p_K is not None or min_p_K is not None:
        kept = thresholds(logits_KV, temperatures_K, top_k_K, top_p_K, min_p_K)
    return _draw(logits_KV, (seeds_K, positions_K, temperatures_K), kept, output_K, num_splits)


def splits_of(num_rows: int, vocab_size: int) -> int:
    """Parts of each row such that the programs fill the device, none of them without a tile."""
    num_tiles = -(-vocab_size // _TILE)
    wanted = min(num_tiles, max(1, -(-_NUM_PROGRAMS // max(1, num_rows))))
    return -(-num_tiles // -(-num_tiles // wanted))


def _draw(
    logits_KV: Tensor,
    random: tuple[Tensor, Tensor, Tensor] | None,
    kept: Thresholds | None,
    output_K: Tensor | None,
    num_splits: int | None,
) -> Tensor:
    """Scores of the splits, merged; `random` are seeds, positions and temperatures, where some row is not greedy."""
    num_rows, vocab_size = logits_KV.shape
    if output_K is None:
        output_K = torch.empty(num_rows, dtype=torch.int64, device=logits_KV.device)
    check_argument("output_K", output_K, (num_rows,), torch.int64, torch.int32)
    if num_splits is not None and num_splits < 1:
        raise ConfigError(
            f"num_splits must be 1 or more, but is {num_splits}; leave it out to have rows fill the device"
        )
    if num_rows == 0:
        return output_K
    num_tiles = -(-vocab_size // _TILE)
    tiles_per_split = -(-num_tiles // (num_splits or splits_of(num_rows, vocab_size)))
    num_splits = -(-num_tiles // tiles_per_split)
    parts_3KS = torch.empty(3, num_rows, num_splits, dtype=torch.int32, device=logits_KV.device)
    seeds_K, positions_K, temperatures_K = random or (logits_KV, logits_KV, logits_KV)  # not looked at
    draw_kernel[(num_rows, num_splits)](
        logits_KV,
        seeds_K,
        positions_K,
        temperatures_K,
        logits_KV if kept is None else kept.keys,
        logits_KV if kept is None else kept.last_ids,
        logits_KV if kept is None else kept.by_rank,
        parts_3KS,
        vocab_size,
        logits_KV.stride(0),
        tiles_per_split,
        DRAWS=random is not None,
        FILTERS=kept is not None,
        TILE=_TILE,
        num_warps=_WARPS,
    )
    # There are no more splits than tiles; how many there are depends on the rows, and must not mean another kernel.
    merge_kernel[(num_rows,)](parts_3KS, output_K, num_splits, BLOCK=1 << (num_tiles - 1).bit_length(), num_warps=1)
    return output_K


@triton.jit(
    do_not_specialize=[
        "seeds",
        "positions",
        "temperatures",
        "threshold_keys",
        "threshold_ids",
        "ranked_rows",
        "tiles_per_split",
    ]
)
def draw_kernel(
    logits: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    temperatures: tl.tensor,
    threshold_keys: tl.tensor,
    threshold_ids: tl.tensor,
    ranked_rows: tl.tensor,
    parts: tl.tensor,
    vocab_size: tl.tensor,
    row_stride: tl.tensor,
    tiles_per_split: tl.tensor,
    DRAWS: tl.constexpr,
    FILTERS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """The best score of one split of a row, where it is, and of rows that go by rank the logit that breaks a tie."""
    row, split = tl.program_id(0), tl.program_id(1)
    row_logits = logits + row * tl.cast(row_stride, tl.int64)
    first_tile = split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(vocab_size, TILE))
    if DRAWS:
        temperature = tl.load(temperatures + row).to(tl.float32)
        key, last_id, by_rank = _LOWEST_KEY, 0, 0
        if FILTERS:
            key, last_id = tl.load(threshold_keys + row), tl.load(threshold_ids + row)
            by_rank = tl.load(ranked_rows + row)
        if temperature >= _MIN_TEMPERATURE:
            low, high = row_keys(tl.load(seeds + row), tl.load(positions + row))
            score, logit_key, token = _best_drawn(
                row_logits,
                vocab_size,
                first_tile,
                last_tile,
                temperature,
                low,
                high,
                key,
                last_id,
                by_rank,
                FILTERS,
                TILE,
            )
        else:
            score, logit_key, token = _best(row_logits, vocab_size, first_tile, last_tile, TILE)
    else:
        score, logit_key, token = _best(row_logits, vocab_size, first_tile, last_tile, TILE)
    place = parts + row * tl.num_programs(1) + split
    size = tl.num_programs(0) * tl.num_programs(1)
    tl.store(place, score.to(tl.int32, bitcast=True))
    tl.store(place + size, logit_key)
    tl.store(place + 2 * size, token)


@triton.jit
def _best(
    row_logits: tl.tensor, vocab_size: tl.tensor, first_tile: tl.tensor, last_tile: tl.tensor, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The largest logit and its lowest id; the first id where there is none above minus infinity."""
    best = tl.full((), float("-inf"), tl.float32)
    token = tl.cast(first_tile * TILE, tl.int32)
    for tile in tl.range(first_tile, last_tile, num_stages=2):
        ids = tile * TILE + tl.arange(0, TILE)
        scores = tl.load(row_logits + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
        scores = tl.where(scores == scores, scores, float("-inf"))
        top = tl.max(scores, axis=0)
        if top > best:
            best = top
            token = tl.min(tl.where(scores == top, ids, _NO_ID), axis=0)
    return best, tl.cast(0, tl.int32), token


@triton.jit
def _best_drawn(
    row_logits: tl.tensor,
    vocab_size: tl.tensor,
    first_tile: tl.tensor,
    last_tile: tl.tensor,
    temperature: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    threshold_key: tl.tensor,
    threshold_id: tl.tensor,
    by_rank: tl.tensor,
    FILTERS: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The largest score, the logit's key (0 where ties go by id alone) and the id; see the module's docstring."""
    inverse = 1.0 / temperature
    best = tl.full((), float("-inf"), tl.float32)
    best_key = tl.full((), _LOWEST_KEY, tl.int32)
    token = tl.cast(first_tile * TILE, tl.int32)
    for tile in tl.range(first_tile, last_tile, num_stages=2):
        ids = tile * TILE + tl.arange(0, TILE)
        logits = tl.load(row_logits + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
        logits = tl.where(logits == logits, logits, float("-inf"))
        if FILTERS:
            keys = ordered_keys(logits)
            kept = (keys > threshold_key) | ((keys == threshold_key) & (ids <= threshold_id))
            logits = tl.where(kept, logits, float("-inf"))
        scaled = logits * inverse
        # An infinite one has no error: nothing is ruled out at first, and no infinity later.
        floor = best - tl.where(tl.abs(best) < float("inf"), _NOISE_ERROR + tl.abs(best) * _SCORE_ERROR, 0.0)
        bound = tl.max(scaled, axis=0)
        if (bound > float("-inf")) & (bound + _LARGEST_NOISE >= floor):
            scores = scaled + approximate_noise(uniform(low, high, ids))
            top = tl.max(scores, axis=0)
            error = tl.where(tl.abs(top) < float("inf"), _NOISE_ERROR + tl.abs(top) * _SCORE_ERROR, 0.0)
            floor = tl.maximum(floor, top - 2.0 * error)
            next_id = tl.min(tl.where(scores >= floor, ids, _NO_ID), axis=0)
            while next_id != _NO_ID:
                logit = tl.load(row_logits + next_id).to(tl.float32)
                noise = exact_noise(uniform(low, high, next_id))
                score = tl.div_rn(logit, temperature) + noise
                logit_key = tl.cast(0, tl.int32)
                if FILTERS:
                    logit_key = tl.where(by_rank != 0, ordered_keys(logit), 0)
                if (score > best) | ((score == best) & (logit_key > best_key)):
                    best = score
                    best_key = logit_key
                    token = next_id
                next_id = tl.min(tl.where((scores >= floor) & (ids > next_id), ids, _NO_ID), axis=0)
    return best, best_key, token


@triton.jit(do_not_specialize=["output", "num_splits"])
def merge_kernel(parts: tl.tensor, output: tl.tensor, num_splits: tl.tensor, BLOCK: tl.constexpr) -> None:
    """The best split of a row: by score, then by the logit that breaks a tie, then by the lowest id."""
    row = tl.program_id(0)
    size = tl.num_programs(0) * num_splits
    splits_S = tl.arange(0, BLOCK)
    inside_S = splits_S < num_splits
    place_S = parts + row * num_splits + splits_S
    scores_S = tl.load(place_S, mask=inside_S, other=0).to(tl.float32, bitcast=True)
    scores_S = tl.where(inside_S, scores_S, float("-inf"))
    keys_S = tl.load(place_S + size, mask=inside_S, other=_LOWEST_KEY)
    tokens_S = tl.load(place_S + 2 * size, mask=inside_S, other=_NO_ID)
    is_best_S = scores_S == tl.max(scores_S, axis=0)
    keys_S = tl.where(is_best_S, keys_S, _LOWEST_KEY)
    is_best_S = is_best_S & (keys_S == tl.max(keys_S, axis=0))
    tl.store(output + row, tl.min(tl.where(is_best_S, tokens_S, _NO_ID), axis=0).to(output.dtype.element_ty))
