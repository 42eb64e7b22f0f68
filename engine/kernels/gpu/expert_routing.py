"""Which experts a token goes to, and where its copies stand when all are sorted by expert, without asking the host.

As `engine.layers.mixture_of_experts` routes: softmax over all experts in float32, the best k, then normalised to one.
Copies are sorted by expert and, within an expert, by token: what is computed does not depend on timing, as places given
out by atomic counters would. Two launches: one picks experts and counts them per block of tokens; in the other every
block adds up the counts of the blocks before it (they are few and in L2) and places its own copies.

Legend: T tokens, X experts, k experts per token, S = T k copies; copy t k + c is choice c of token t.
Bound: launches, about 3 us each. Llama-sized batches move 0.5 MB of logits and as much of counts.
"""

# mypy: disable-error-code="misc"

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.gpu.narrowing import narrow
from engine.kernels.gpu.row_launch import check_argument

# Tokens x experts that a program holds, 16 numbers for each of its 128 threads; and the most tokens.
_TILE = 2048
_MAX_TOKENS = 32
_MAX_EXPERTS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRouting:
    """Everything the grouped GEMMs and the sum of a token's copies need, on the device."""

    scores: Tensor  # [T, k] float32, or of the logits' type where scores are rounded to it
    experts: Tensor  # [T, k] int32; -1 for every choice of a padded token
    order: Tensor  # [S] int32: the copy at each place; places from the last expert's end on hold nothing
    starts: Tensor  # [X + 1] int32: the first place of each expert, then how many copies there are

    @property
    def num_experts(self) -> int:
        return self.starts.numel() - 1

    @property
    def num_experts_per_token(self) -> int:
        return self.experts.shape[1]


def route(
    router_logits_TX: Tensor,
    num_experts_per_token: int,
    *,
    normalise: bool,
    round_scores: bool,
    positions_T: Tensor | None = None,
) -> ExpertRouting:
    """Route T tokens by their logits [T, X] of any floating type but float64.

    `positions_T`: integers on the device, if rows whose position is negative are padding; those get no place.
    Of equal probabilities the first expert is taken. Raises ConfigError where shapes cannot be routed.
    """
    if router_logits_TX.dim() != 2 or router_logits_TX.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ConfigError(
            f"route: logits are {list(router_logits_TX.shape)} of {router_logits_TX.dtype}; "
            "they must be [T, X] of bfloat16, float16 or float32"
        )
    num_rows, num_experts = router_logits_TX.shape
    if not 1 <= num_experts_per_token <= num_experts <= _MAX_EXPERTS or router_logits_TX.stride(1) != 1:
        raise ConfigError(
            f"route: {num_experts_per_token} of {num_experts} experts with strides {router_logits_TX.stride()}; "
            f"k must be 1..X, X at most {_MAX_EXPERTS}, and a token's logits adjacent"
        )
    if positions_T is not None:
        check_argument("positions_T", positions_T, (num_rows,), torch.int64, torch.int32)
    integers = functools.partial(torch.empty, dtype=torch.int32, device=router_logits_TX.device)
    score_dtype = router_logits_TX.dtype if round_scores else torch.float32
    routing = ExpertRouting(
        scores=router_logits_TX.new_empty((num_rows, num_experts_per_token), dtype=score_dtype),
        experts=integers((num_rows, num_experts_per_token)),
        order=integers(num_rows * num_experts_per_token),
        starts=integers(num_experts + 1),
    )
    experts_block = max(16, triton.next_power_of_2(num_experts))
    tokens_block = min(_MAX_TOKENS, _TILE // experts_block)
    num_blocks = max(1, -(-num_rows // tokens_block))  # one even for no tokens: it writes the starts
    counts_BX = integers((num_blocks, num_experts))
    choices_block = triton.next_power_of_2(num_experts_per_token)
    _pick_experts[(num_blocks,)](
        router_logits_TX, routing.scores, routing.experts, counts_BX, positions_T, num_rows,
        router_logits_TX.stride(0), num_experts, num_experts_per_token, normalise, tokens_block, experts_block,
        choices_block, num_warps=4,
    )  # fmt: skip
    _place_copies[(num_blocks,)](
        routing.experts, counts_BX, routing.order, routing.starts, num_rows, num_blocks, num_experts,
        num_experts_per_token, tokens_block, experts_block, tokens_block, num_warps=4,
    )  # fmt: skip
    return routing


@triton.jit(do_not_specialize=["positions", "num_rows"])
def _pick_experts(
    logits: tl.tensor,
    scores: tl.tensor,
    experts: tl.tensor,
    counts: tl.tensor,
    positions: tl.tensor,
    num_rows: tl.tensor,
    logits_stride: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    NUM_CHOICES: tl.constexpr,
    NORMALISE: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
) -> None:
    """Scores and experts of a block of tokens, and how many of its copies each expert gets."""
    block = tl.program_id(0)
    tokens_T = block * TOKENS + tl.arange(0, TOKENS)
    experts_X = tl.arange(0, EXPERTS)
    choices_k = tl.arange(0, CHOICES)
    inside_TX = (tokens_T < num_rows)[:, None] & (experts_X < NUM_EXPERTS)[None, :]
    places_TX = logits + tokens_T.to(tl.int64)[:, None] * logits_stride + experts_X[None, :]
    logits_TX = tl.load(places_TX, mask=inside_TX, other=0.0).to(tl.float32)
    logits_TX = tl.where((experts_X < NUM_EXPERTS)[None, :], logits_TX, float("-inf"))
    powers_TX = tl.exp(logits_TX - tl.max(logits_TX, axis=1)[:, None])
    probabilities_TX = powers_TX / tl.sum(powers_TX, axis=1)[:, None]
    # NaN is never the largest, yet some expert must be: a token of NaN goes to the first ones, and stays NaN there.
    left_TX = tl.where(probabilities_TX == probabilities_TX, probabilities_TX, 0.0)
    left_TX = tl.where((experts_X < NUM_EXPERTS)[None, :], left_TX, -1.0)
    scores_Tk = tl.zeros((TOKENS, CHOICES), tl.float32)
    chosen_Tk = tl.zeros((TOKENS, CHOICES), tl.int32)
    for choice in tl.static_range(NUM_CHOICES):
        is_best_TX = left_TX == tl.max(left_TX, axis=1)[:, None]
        best_T = tl.min(tl.where(is_best_TX, experts_X[None, :], EXPERTS), axis=1)
        is_chosen_TX = experts_X[None, :] == best_T[:, None]
        score_T = tl.sum(tl.where(is_chosen_TX, probabilities_TX, 0.0), axis=1)
        scores_Tk = tl.where(choices_k[None, :] == choice, score_T[:, None], scores_Tk)
        chosen_Tk = tl.where(choices_k[None, :] == choice, best_T[:, None], chosen_Tk)
        left_TX = tl.where(is_chosen_TX, -1.0 - choice, left_TX)
    if NORMALISE:
        scores_Tk = scores_Tk / tl.sum(scores_Tk, axis=1)[:, None]
    real_T = tokens_T < num_rows
    if positions is not None:
        real_T = real_T & (tl.load(positions + tokens_T, mask=real_T, other=-1) >= 0)
    inside_Tk = (tokens_T < num_rows)[:, None] & (choices_k < NUM_CHOICES)[None, :]
    offsets_Tk = tokens_T[:, None] * NUM_CHOICES + choices_k[None, :]
    tl.store(scores + offsets_Tk, narrow(scores_Tk, scores.dtype.element_ty), mask=inside_Tk)
    tl.store(experts + offsets_Tk, tl.where(real_T[:, None], chosen_Tk, -1), mask=inside_Tk)
    # Chosen ones are below zero by now, and so is what is beyond the experts.
    is_copy_TX = (left_TX < 0.0) & real_T[:, None]
    counts_X = tl.sum(is_copy_TX.to(tl.int32), axis=0)
    tl.store(counts + block * NUM_EXPERTS + experts_X, counts_X, mask=experts_X < NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def _place_copies(
    experts: tl.tensor,
    counts: tl.tensor,
    order: tl.tensor,
    starts: tl.tensor,
    num_rows: tl.tensor,
    num_blocks: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    NUM_CHOICES: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """The place of each copy: its expert's start, the copies of earlier blocks, those of earlier tokens of this one."""
    block = tl.program_id(0)
    experts_X = tl.arange(0, EXPERTS)
    total_X = tl.zeros((EXPERTS,), tl.int32)
    before_X = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, num_blocks, BLOCKS):
        blocks_B = first + tl.arange(0, BLOCKS)
        inside_BX = (blocks_B < num_blocks)[:, None] & (experts_X < NUM_EXPERTS)[None, :]
        counts_BX = tl.load(
            counts + blocks_B[:, None] * NUM_EXPERTS + experts_X[None, :], mask=inside_BX, other=0
        )  # fmt: skip
        total_X += tl.sum(counts_BX, axis=0)
        before_X += tl.sum(tl.where((blocks_B < block)[:, None], counts_BX, 0), axis=0)
    starts_X = tl.cumsum(total_X, axis=0) - total_X
    if block == 0:
        tl.store(starts + experts_X, starts_X, mask=experts_X < NUM_EXPERTS)
        tl.store(starts + NUM_EXPERTS, tl.sum(total_X, axis=0))
    tokens_T = block * TOKENS + tl.arange(0, TOKENS)
    has_TX = tl.zeros((TOKENS, EXPERTS), tl.int32)
    for choice in tl.static_range(NUM_CHOICES):
        chosen_T = tl.load(experts + tokens_T * NUM_CHOICES + choice, mask=tokens_T < num_rows, other=-1)
        has_TX += (experts_X[None, :] == chosen_T[:, None]).to(tl.int32)
    places_TX = tl.cumsum(has_TX, axis=0) - has_TX + (starts_X + before_X)[None, :]
    for choice in tl.static_range(NUM_CHOICES):
        copies_T = tokens_T * NUM_CHOICES + choice
        chosen_T = tl.load(experts + copies_T, mask=tokens_T < num_rows, other=-1)
        place_T = tl.sum(tl.where(experts_X[None, :] == chosen_T[:, None], places_TX, 0), axis=1)
        tl.store(order + place_T, copies_T, mask=chosen_T >= 0)
