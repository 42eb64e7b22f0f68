import functools
from dataclasses import replace

import pytest
import torch

from engine.errors import ConfigError
from engine.kernels.gpu.expert_routing import route
from engine.kernels.gpu.mixture_of_experts import expert_flops, mixture_of_experts, sum_copies
from engine.layers.mixture_of_experts import GroupedExperts
from engine.model_config import Architecture
from engine.random_checkpoint import sized_config
from engine.tensor_parallel import TensorParallel


def experts_of(
    num_experts: int, num_choices: int, normalise: bool, round_scores: bool, dtype: torch.dtype, device: torch.device
) -> GroupedExperts:
    config = sized_config(Architecture.MIXTRAL, num_experts=num_experts, num_experts_per_token=num_choices)
    config = replace(config, moe_intermediate_size=48, hidden_size=64, norm_topk_prob=normalise)
    experts = GroupedExperts(config, TensorParallel(), round_scores)
    for parameter in experts.parameters():
        parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    return experts.to(dtype).to(device)


@pytest.mark.parametrize(
    ("dtype", "round_scores"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
@pytest.mark.parametrize(
    ("num_experts", "num_choices", "normalise"), [(8, 2, True), pytest.param(24, 6, False, marks=pytest.mark.slow)]
)
def test_equals_the_layer(
    num_experts: int, num_choices: int, normalise: bool, dtype: torch.dtype, round_scores: bool, device: torch.device
) -> None:
    experts = experts_of(num_experts, num_choices, normalise, round_scores, dtype, device)
    hidden_TE = torch.randn(41, 64, device=device).to(dtype)
    logits_TX = torch.randn(41, num_experts, device=device).to(dtype)
    # Distinct, so that both choose the same experts.
    logits_TX = logits_TX.argsort(-1).argsort(-1).to(dtype) / 8
    actual = mixture_of_experts(
        hidden_TE,
        logits_TX,
        experts.gate_up_proj,
        experts.down_proj,
        num_choices,
        normalise=normalise,
        round_scores=round_scores,
        num_sms=5,
    )
    expected = experts(hidden_TE, logits_TX)
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    assert error < (1e-6 if dtype is torch.float32 else 4e-3)
    assert actual.dtype is dtype


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy
def test_padding_gives_zeros_and_changes_no_real_token(device: torch.device) -> None:
    experts = experts_of(8, 2, True, False, torch.bfloat16, device)
    hidden_TE = torch.randn(40, 64, device=device).bfloat16()
    logits_TX = torch.randn(40, 8, device=device)
    compute = functools.partial(mixture_of_experts, normalise=True, round_scores=False, num_sms=3)
    weights = experts.gate_up_proj, experts.down_proj
    positions_T = torch.arange(40, device=device)
    positions_T[14:19] = positions_T[38:] = -1  # behind the tokens of each of two nano-batches
    is_real = positions_T >= 0
    alone = compute(hidden_TE[is_real], logits_TX[is_real], *weights, 2)
    hidden_TE[~is_real], logits_TX[~is_real] = float("nan"), float("nan")
    output = torch.full_like(hidden_TE, float("nan"))
    compute(hidden_TE, logits_TX, *weights, 2, positions_T=positions_T, output=output)
    assert torch.equal(output[is_real], alone)
    assert not output[~is_real].any()


def test_copies_are_added_in_the_order_of_choices(device: torch.device) -> None:
    """Three numbers whose sum in float32 depends on the order."""
    logits_TX = torch.tensor([[3.0, 2.0, 1.0]], device=device)
    routing = route(logits_TX, 3, normalise=False, round_scores=False)
    routing.scores.fill_(1.0)
    copies_SE = torch.tensor([[2.0**24], [1.0], [-(2.0**24)]], device=device)
    assert sum_copies(copies_SE, routing).item() == 0.0
    assert sum_copies(copies_SE[[0, 2, 1]].contiguous(), routing).item() == 1.0


def test_products_are_rounded_where_scores_are_and_not_elsewhere(device: torch.device) -> None:
    logits_TX = torch.randn(20, 5, device=device)
    copies_SE = torch.randn(40, 24, device=device).bfloat16()
    for score_dtype in (torch.bfloat16, torch.float32):
        routing = route(logits_TX.to(score_dtype), 2, normalise=True, round_scores=True)
        products_TkE = copies_SE.view(20, 2, 24) * routing.scores[..., None]
        assert products_TkE.dtype is score_dtype
        expected_TE = products_TkE.float().sum(dim=1).bfloat16()
        torch.testing.assert_close(sum_copies(copies_SE, routing), expected_TE, rtol=0, atol=0)


def test_copies_of_padded_tokens_are_not_looked_at(device: torch.device) -> None:
    positions_T = torch.tensor([0, 1, 2, -1, -1], device=device)
    routing = route(torch.randn(5, 4, device=device), 2, normalise=True, round_scores=False, positions_T=positions_T)
    copies_SE = torch.full((10, 16), float("nan"), device=device)
    copies_SE[:6] = 1.0
    sums_TE = sum_copies(copies_SE, routing)
    torch.testing.assert_close(sums_TE[:3], torch.ones(3, 16, device=device))
    assert not sums_TE[3:].any()


def test_copies_that_do_not_fit_are_refused(device: torch.device) -> None:
    routing = route(torch.randn(4, 3, device=device), 2, normalise=True, round_scores=False)
    with pytest.raises(ConfigError, match=r"they must be dense, \[8, E\]"):
        sum_copies(torch.randn(7, 16, device=device), routing)
    with pytest.raises(ConfigError, match=r"it must be dense, \[4, 16\]"):
        sum_copies(torch.randn(8, 16, device=device), routing, output=torch.empty(8, 16, device=device))


def test_flops_are_those_of_the_layer() -> None:
    assert expert_flops(3, 2, 4096, 14336) == 3 * 2 * 6 * 4096 * 14336
