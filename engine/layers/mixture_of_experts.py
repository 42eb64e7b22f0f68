"""`MixtureOfExperts`: a feed-forward of which every token passes only the few experts a router picks.

Every rank holds a slice of every expert (cut along the intermediate size), so that ranks do equal work however
tokens are routed. Tokens are sorted by expert; each projection is then one grouped GEMM over the experts.
Shapes: T tokens, E hidden, X experts, k experts per token, S = T k token copies sorted by expert, F intermediate
size of this rank.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.batch_shape import BatchShape
from engine.kernels.fp8_product import grouped_fp8_product
from engine.layers.collective import AllReduce
from engine.layers.linear import Linear
from engine.model_config import ModelConfig
from engine.operation import Operation, Resource, Work
from engine.step_inputs import StepInputs
from engine.tensor_parallel import TensorParallel
from engine.weight_layout import SCALE_BYTES


class GroupedExperts(Operation):
    """Routes the tokens by the router's logits, applies the experts and adds up their weighted outputs."""

    resource = Resource.COMPUTE

    def __init__(self, config: ModelConfig, tensor_parallel: TensorParallel, round_scores: bool) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.num_experts_per_token = config.num_experts_per_token
        self.normalise = config.norm_topk_prob
        self.round_scores = round_scores
        intermediate = config.moe_intermediate_size // tensor_parallel.size
        gate_up_XOE = torch.empty(config.num_experts, 2 * intermediate, config.hidden_size)
        down_XEF = torch.empty(config.num_experts, config.hidden_size, intermediate)
        self.gate_up_proj = nn.Parameter(gate_up_XOE, requires_grad=False)
        self.down_proj = nn.Parameter(down_XEF, requires_grad=False)
        # Of each output channel of each expert, where the weights are in FP8: see `engine.kernels.row_scales`.
        self.gate_up_proj_scale: nn.Parameter | None = None
        self.down_proj_scale: nn.Parameter | None = None

    def use_fp8(self) -> None:
        """Have weights in FP8; to be called before they have memory."""
        for name, weight in (("gate_up_proj", self.gate_up_proj), ("down_proj", self.down_proj)):
            weight_XOI = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
            scales_XO = weight_XOI.new_empty(weight_XOI.shape[:2], dtype=torch.float32)
            setattr(self, name, nn.Parameter(weight_XOI, requires_grad=False))
            setattr(self, name + "_scale", nn.Parameter(scales_XO, requires_grad=False))

    def forward(self, hidden_TE: Tensor, router_logits_TX: Tensor, step: StepInputs | None = None) -> Tensor:
        """[T, E], [T, X] -> [T, E]. `step` tells whoever else computes this which rows have no token."""
        scores_Tk, experts_Tk = self.route(router_logits_TX)
        experts_S, order_S = experts_Tk.flatten().sort(stable=True)
        ends_X = torch.searchsorted(experts_S, torch.arange(self.num_experts, device=experts_S.device), right=True)
        ends_X = ends_X.to(torch.int32)
        sorted_SE = hidden_TE[order_S // self.num_experts_per_token]
        gate_SF, up_SF = grouped_linear(sorted_SE, self.gate_up_proj, ends_X, self.gate_up_proj_scale).chunk(2, dim=-1)
        output_SE = grouped_linear(functional.silu(gate_SF) * up_SF, self.down_proj, ends_X, self.down_proj_scale)
        # Back to the order of the tokens first: a sum over k adds in a fixed order, index_add_ on a GPU does not.
        unsorted_SE = torch.empty_like(output_SE)
        unsorted_SE[order_S] = output_SE
        copies_TkE = unsorted_SE.view(*experts_Tk.shape, hidden_TE.shape[1])
        return (copies_TkE * scores_Tk[..., None]).sum(dim=1).to(hidden_TE.dtype)

    def route(self, router_logits_TX: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and experts [T, k] of each token: softmax over all experts, the best k, then normalised to one."""
        wide = torch.promote_types(router_logits_TX.dtype, torch.float32)
        probabilities_TX = torch.softmax(router_logits_TX, dim=-1, dtype=wide)
        scores_Tk, experts_Tk = probabilities_TX.topk(self.num_experts_per_token, dim=-1)
        if self.normalise:
            scores_Tk = scores_Tk / scores_Tk.sum(dim=-1, keepdim=True)
        if self.round_scores:
            scores_Tk = scores_Tk.to(router_logits_TX.dtype)
        return scores_Tk, experts_Tk

    def work(self, shape: BatchShape, element_bytes: int) -> Work:
        """The products of k experts a token, and the weights of as many experts as T tokens may be expected to meet.

        Were experts picked with equal chances, one would get none of T tokens with the chance (1 - k / X)^T. Beside
        the two products and the activation between them, copies of the tokens are sorted, put back and added up.
        """
        num_experts, hidden, intermediate = self.down_proj.shape
        num_copies = shape.num_tokens * self.num_experts_per_token
        num_used = num_experts * (1 - (1 - self.num_experts_per_token / num_experts) ** shape.num_tokens)
        moved_hidden = 7 * num_copies + shape.num_tokens  # sorted, read, written, put back, weighted and summed
        moved_intermediate = 6 * num_copies  # gate and up written and read, their product written and read
        parameter_bytes, fp8_flops = element_bytes * 3 * hidden * intermediate, 0.0
        if self.down_proj_scale is not None:
            fp8_flops = num_copies * 6 * hidden * intermediate
            parameter_bytes = 3 * hidden * intermediate + SCALE_BYTES * (2 * intermediate + hidden)
        return Work(
            flops=num_copies * (6 * hidden * intermediate + 5 * intermediate + 2 * hidden),
            fp8_flops=fp8_flops,
            weight_bytes=num_used * parameter_bytes,
            sharded_bytes=moved_intermediate * intermediate * element_bytes,
            replicated_bytes=moved_hidden * hidden * element_bytes,
        )


class MixtureOfExperts(nn.Module):
    """Router, experts and the sum over ranks. `round_scores`: routing scores are rounded to the model's dtype."""

    def __init__(self, config: ModelConfig, tensor_parallel: TensorParallel, round_scores: bool) -> None:
        super().__init__()
        self.router = Linear(config.hidden_size, config.num_experts)
        self.experts = GroupedExperts(config, tensor_parallel, round_scores)
        self.all_reduce = AllReduce(tensor_parallel, config.hidden_size)

    def forward(self, hidden_TE: Tensor, step: StepInputs) -> Tensor:
        """[T, E] -> [T, E]."""
        output_TE: Tensor = self.all_reduce(self.experts(hidden_TE, self.router(hidden_TE), step))
        return output_TE


def grouped_linear(sorted_SI: Tensor, weight_XOI: Tensor, ends_X: Tensor, scales_XO: Tensor | None = None) -> Tensor:
    """Multiply rows ends[x - 1] .. ends[x] - 1 by the transpose of weight[x]: [S, I] -> [S, O].

    Weights in FP8 have scales.

    PyTorch's grouped GEMM takes no float64 and wants rows of a multiple of 16 bytes; the loop over the experts that
    have tokens is for what it does not take. On a GPU, in anything but bfloat16 on Hopper or Blackwell, it reads `ends`
    on the host: the host then waits for the device, and such a model cannot become a CUDA graph.
    """
    if scales_XO is not None:
        return grouped_fp8_product(sorted_SI, weight_XOI, scales_XO, ends_X)
    row_bytes = weight_XOI.shape[2] * weight_XOI.element_size()
    if sorted_SI.dtype is not torch.float64 and row_bytes % 16 == 0:
        return functional.grouped_mm(sorted_SI, weight_XOI.transpose(1, 2), offs=ends_X)
    output_SO = sorted_SI.new_empty(sorted_SI.shape[0], weight_XOI.shape[1])
    start = 0
    for expert, end in enumerate(ends_X.tolist()):
        if end > start:
            output_SO[start:end] = functional.linear(sorted_SI[start:end], weight_XOI[expert])
        start = end
    return output_SO
