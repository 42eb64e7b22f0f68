"""Grouped experts against a loop over tokens, in every dtype and at awkward sizes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engine.layers.mixture_of_experts import GroupedExperts, grouped_linear
from engine.model_config import Architecture, ModelConfig
from engine.random_checkpoint import sized_config
from engine.tensor_parallel import TensorParallel

MIXTRAL = sized_config(Architecture.MIXTRAL, num_experts=6, num_experts_per_token=2)


def _experts(config: ModelConfig, dtype: torch.dtype, round_scores: bool = False) -> GroupedExperts:
    experts = GroupedExperts(config, TensorParallel(), round_scores).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return experts


def _token_by_token(experts: GroupedExperts, hidden: Tensor, router_logits: Tensor) -> Tensor:
    outputs = []
    for token, logits in zip(hidden, router_logits, strict=True):
        scores, chosen = logits.softmax(-1).topk(experts.num_experts_per_token)
        if experts.normalise:
            scores = scores / scores.sum()
        total = torch.zeros_like(token)
        for score, expert in zip(scores, chosen, strict=True):
            gate, up = (experts.gate_up_proj[expert] @ token).chunk(2)
            total += score * (experts.down_proj[expert] @ (functional.silu(gate) * up))
        outputs.append(total)
    return torch.stack(outputs)


@pytest.mark.parametrize("intermediate_size", [128, 6])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_a_loop_over_tokens(dtype: torch.dtype, normalise: bool, intermediate_size: int) -> None:
    config = replace(MIXTRAL, moe_intermediate_size=intermediate_size, norm_topk_prob=normalise)
    experts = _experts(config, dtype)
    hidden, router_logits = torch.randn(23, config.hidden_size).to(dtype), torch.randn(23, 6).to(dtype)
    expected = _token_by_token(experts, hidden, router_logits)
    assert torch.allclose(experts(hidden, router_logits), expected, atol=1e-5)


def test_tokens_that_all_choose_the_same_experts() -> None:
    experts = _experts(MIXTRAL, torch.float32)
    hidden = torch.randn(9, MIXTRAL.hidden_size)
    router_logits = torch.tensor([0.0, 5.0, 0.0, 0.0, 4.0, 0.0]).expand(9, 6)
    assert torch.allclose(experts(hidden, router_logits), _token_by_token(experts, hidden, router_logits), atol=1e-5)


def test_a_token_does_not_depend_on_the_others() -> None:
    experts = _experts(MIXTRAL, torch.float32)
    hidden, router_logits = torch.randn(50, MIXTRAL.hidden_size), torch.randn(50, 6)
    together = experts(hidden, router_logits)
    alone = torch.cat([experts(hidden[i : i + 1], router_logits[i : i + 1]) for i in range(50)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_no_tokens_at_all() -> None:
    experts = _experts(MIXTRAL, torch.float32)
    assert experts(torch.empty(0, MIXTRAL.hidden_size), torch.empty(0, 6)).shape == (0, MIXTRAL.hidden_size)


def test_scores_are_rounded_where_the_architecture_rounds_them() -> None:
    router_logits = torch.randn(5, 6, dtype=torch.bfloat16)
    assert _experts(MIXTRAL, torch.bfloat16).route(router_logits)[0].dtype is torch.float32
    assert _experts(MIXTRAL, torch.bfloat16, round_scores=True).route(router_logits)[0].dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_grouped_gemm_skips_experts_without_tokens(dtype: torch.dtype) -> None:
    rows, weight = torch.randn(5, 16).to(dtype), torch.randn(4, 8, 16).to(dtype)
    ends = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    expected = torch.cat((rows[:3] @ weight[1].T, rows[3:] @ weight[3].T))
    assert torch.allclose(grouped_linear(rows, weight, ends), expected, atol=1e-2)
