"""The experts of a feed-forward on the device: routing, two grouped GEMMs, and the sum of each token's copies.

Equal to `engine.layers.mixture_of_experts.GroupedExperts`, rounding where it rounds. Five launches whose grids depend
on sizes alone, so one CUDA graph serves every routing and whichever of its T rows have tokens. A token's k weighted
copies are added in the order of its choices: the same sum however tokens are routed and whatever runs beside it.

Legend: T tokens, E hidden, X experts, k experts per token, S = T k copies, F intermediate size of this rank.
6 S E F flops. The sum moves (S + T) E elements: Mixtral, 2,048 tokens, 50 MB or 13 us at 4 TB/s; bound by memory.
"""

# mypy: disable-error-code="misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.gpu.expert_routing import ExpertRouting, route
from engine.kernels.gpu.grouped_gemm import gated_gemm, scattered_gemm
from engine.kernels.gpu.narrowing import narrow

_COLUMNS = 1024  # of one program: 8 elements, 16 bytes, for each of 128 threads


def mixture_of_experts(
    hidden_TE: Tensor,
    router_logits_TX: Tensor,
    gate_up_XOE: Tensor,
    down_XEF: Tensor,
    num_experts_per_token: int,
    *,
    normalise: bool,
    round_scores: bool,
    num_sms: int,
    positions_T: Tensor | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """[T, E], logits [T, X], weights [X, 2 F, E] and [X, E, F] -> [T, E]; the GEMMs run at most `num_sms` programs.

    `positions_T`: integers on the device, if rows whose position is negative are padding; they become zeros.
    """
    routing = route(
        router_logits_TX, num_experts_per_token, normalise=normalise, round_scores=round_scores, positions_T=positions_T
    )
    activated_SF = gated_gemm(hidden_TE, gate_up_XOE, routing, num_sms=num_sms)
    copies_SE = scattered_gemm(activated_SF, down_XEF, routing, num_sms=num_sms)
    return sum_copies(copies_SE, routing, output=output)


def sum_copies(copies_SE: Tensor, routing: ExpertRouting, *, output: Tensor | None = None) -> Tensor:
    """Each token's copies times their scores, added in the order of its choices: [S, E] -> [T, E]; padding gives zeros.

    Products have the wider of both types, sums float32. Raises ConfigError where an operand does not fit the routing.
    """
    num_tokens, num_choices = routing.experts.shape
    if copies_SE.dim() != 2 or copies_SE.shape[0] != num_tokens * num_choices or not copies_SE.is_contiguous():
        raise ConfigError(
            f"sum_copies: copies are {list(copies_SE.shape)} with strides {copies_SE.stride()}; "
            f"they must be dense, [{num_tokens * num_choices}, E]"
        )
    width = copies_SE.shape[1]
    if output is None:
        output = copies_SE.new_empty((num_tokens, width))
    if output.shape != (num_tokens, width) or output.dtype != copies_SE.dtype or not output.is_contiguous():
        raise ConfigError(
            f"sum_copies: the output is {list(output.shape)} of {output.dtype} with strides {output.stride()}; "
            f"it must be dense, [{num_tokens}, {width}] of {copies_SE.dtype}"
        )
    if output.numel():
        rounds = torch.promote_types(copies_SE.dtype, routing.scores.dtype) is copies_SE.dtype
        _sum_copies[(num_tokens, triton.cdiv(width, _COLUMNS))](
            copies_SE, routing.scores, routing.experts, output, width, num_choices, rounds, _COLUMNS, num_warps=4
        )
    return output


@triton.jit
def _sum_copies(
    copies: tl.tensor,
    scores: tl.tensor,
    experts: tl.tensor,
    output: tl.tensor,
    width: tl.tensor,
    NUM_CHOICES: tl.constexpr,
    ROUNDS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """A slice of one token. ROUNDS: products are rounded to the copies' type."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((COLUMNS,), tl.float32)
    for choice in tl.static_range(NUM_CHOICES):
        copy = token * NUM_CHOICES + choice
        # The copies of a padded token were never written.
        is_real = tl.load(experts + copy) >= 0
        values = tl.load(copies + copy * width + columns, mask=(columns < width) & is_real, other=0.0).to(tl.float32)
        products = values * tl.where(is_real, tl.load(scores + copy).to(tl.float32), 0.0)
        if ROUNDS:
            products = narrow(products, copies.dtype.element_ty).to(tl.float32)
        sums += products
    tl.store(output + token * width + columns, narrow(sums, output.dtype.element_ty), mask=columns < width)


def expert_flops(num_tokens: int, num_experts_per_token: int, hidden_size: int, intermediate_size: int) -> int:
    """Additions and multiplications of the three products of each copy."""
    return 6 * num_tokens * num_experts_per_token * hidden_size * intermediate_size
