import functools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engine.errors import ConfigError
from engine.kernels.gpu.expert_routing import ExpertRouting, route
from engine.kernels.gpu.gemm_config import GemmConfig
from engine.kernels.gpu.grouped_gemm import gated_gemm, scattered_gemm
from engine.kernels.gpu.grouped_gemm_config import (
    GATED_CANDIDATES,
    PLAIN_CANDIDATES,
    choose_grouped_config,
    expected_row_tiles,
)
from tests.engine.kernels.gpu.sm90 import LARGEST_SHARED_BYTES

SMALL = GemmConfig(rows=16, columns=16, num_warps=4, num_stages=3, group=3, epilogue_parts=2, inner_bytes=64)
UNTOUCHED = 12345.0


def routed(logits_TX: Tensor, num_choices: int, num_tokens: int | None = None) -> ExpertRouting:
    positions_T = None
    if num_tokens is not None:
        rows_T = torch.arange(len(logits_TX), device=logits_TX.device)
        positions_T = torch.where(rows_T < num_tokens, rows_T, -1)
    return route(logits_TX, num_choices, normalise=True, round_scores=False, positions_T=positions_T)


def logits_with_empty_experts(num_tokens: int, num_experts: int, device: torch.device) -> Tensor:
    """The first, the last and one more expert get nothing, another one gets every token."""
    logits_TX = torch.randn(num_tokens, num_experts, device=device)
    logits_TX[:, [0, 2, -1]] = -100
    logits_TX[:, 3] = 100
    return logits_TX


def expected_gated(hidden_TE: Tensor, gate_up_XOE: Tensor, routing: ExpertRouting) -> Tensor:
    """Place by place, in float64, rounded where the kernel rounds."""
    rows = []
    num_copies = int(routing.starts[-1])
    for place in range(num_copies):
        copy = int(routing.order[place])
        expert = int(routing.experts.flatten()[copy])
        token = copy // routing.num_experts_per_token
        product = (gate_up_XOE[expert].double() @ hidden_TE[token].double()).to(hidden_TE.dtype)
        gate, up = product.chunk(2)
        rows.append(functional.silu(gate) * up)
    return torch.stack(rows)


def expected_scattered(sorted_SF: Tensor, down_XEF: Tensor, routing: ExpertRouting) -> Tensor:
    output = torch.full((sorted_SF.shape[0], down_XEF.shape[1]), UNTOUCHED, dtype=torch.float64)
    for place in range(int(routing.starts[-1])):
        copy = int(routing.order[place])
        expert = int(routing.experts.flatten()[copy])
        output[copy] = (down_XEF[expert].double() @ sorted_SF[place].double()).cpu()
    return output


def operands(
    num_experts: int, hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    gate_up_XOE = torch.randn(num_experts, 2 * intermediate, hidden, device=device) / hidden**0.5
    down_XEF = torch.randn(num_experts, hidden, intermediate, device=device) / intermediate**0.5
    return [gate_up_XOE.to(dtype), down_XEF.to(dtype)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_tokens", "padded", "hidden", "intermediate"), [(45, 0, 72, 40), (20, 6, 32, 56)])
@pytest.mark.parametrize("num_sms", [1, 4])
def test_both_forms_equal_the_product_of_each_copy(
    num_tokens: int,
    padded: int,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype,
    num_sms: int,
    device: torch.device,
) -> None:
    routing = routed(logits_with_empty_experts(num_tokens + padded, 7, device), 2, num_tokens)
    gate_up_XOE, down_XEF = operands(7, hidden, intermediate, dtype, device)
    hidden_TE = torch.randn(num_tokens + padded, hidden, device=device).to(dtype)
    num_copies = 2 * (num_tokens + padded)
    eps = torch.finfo(dtype).eps
    assert_close = functools.partial(torch.testing.assert_close, rtol=2 * eps, atol=2 * eps + 2e-6)

    sorted_SF = torch.full((num_copies, intermediate), UNTOUCHED, dtype=dtype, device=device)
    assert gated_gemm(hidden_TE, gate_up_XOE, routing, num_sms=num_sms, output=sorted_SF, config=SMALL) is sorted_SF
    exact = expected_gated(hidden_TE, gate_up_XOE, routing)
    assert_close(sorted_SF[: len(exact)], exact)
    assert bool((sorted_SF[len(exact) :] == torch.tensor(UNTOUCHED, dtype=dtype)).all())

    copies_SE = torch.full((num_copies, hidden), UNTOUCHED, dtype=dtype, device=device)
    scattered_gemm(sorted_SF, down_XEF, routing, num_sms=num_sms, output=copies_SE, config=SMALL)
    expected = expected_scattered(sorted_SF, down_XEF, routing).to(dtype).to(device)
    assert_close(copies_SE, expected)


@pytest.mark.slow
@pytest.mark.parametrize("config", [*GATED_CANDIDATES, *PLAIN_CANDIDATES], ids=lambda c: f"{c.rows}x{c.columns}")
def test_every_candidate_computes(config: GemmConfig, device: torch.device) -> None:
    routing = routed(logits_with_empty_experts(70, 6, device), 2)
    gate_up_XOE, down_XEF = operands(6, 72, 136, torch.bfloat16, device)
    hidden_TE = torch.randn(70, 72, device=device).bfloat16()
    assert_close = functools.partial(torch.testing.assert_close, rtol=0.02, atol=0.02)
    sorted_SF = torch.randn(140, 136, device=device).bfloat16()
    if config in GATED_CANDIDATES:
        gated_gemm(hidden_TE, gate_up_XOE, routing, num_sms=3, config=config, output=sorted_SF)
        assert_close(sorted_SF, expected_gated(hidden_TE, gate_up_XOE, routing))
    if config in PLAIN_CANDIDATES:
        copies_SE = scattered_gemm(sorted_SF, down_XEF, routing, num_sms=3, config=config)
        expected = expected_scattered(sorted_SF, down_XEF, routing).bfloat16().to(device)
        assert_close(copies_SE, expected)


def test_no_real_token_writes_nothing(device: torch.device) -> None:
    routing = routed(torch.randn(9, 4, device=device), 2, num_tokens=0)
    gate_up_XOE, _ = operands(4, 16, 16, torch.float32, device)
    output = torch.full((18, 16), UNTOUCHED, device=device)
    gated_gemm(torch.randn(9, 16, device=device), gate_up_XOE, routing, num_sms=2, output=output, config=SMALL)
    assert bool((output == UNTOUCHED).all())


def test_operands_that_do_not_fit_are_refused(device: torch.device) -> None:
    routing = routed(torch.randn(9, 4, device=device), 2)
    gate_up_XOE, down_XEF = operands(4, 16, 16, torch.float32, device)
    hidden_TE = torch.randn(9, 16, device=device)
    with pytest.raises(ConfigError, match=r"the input is \[18, 16\]; it must be \[9, 16\]"):
        gated_gemm(torch.randn(18, 16, device=device), gate_up_XOE, routing, num_sms=1)
    with pytest.raises(ConfigError, match=r"they must be dense, \[4, outputs, inner\]"):
        gated_gemm(hidden_TE, gate_up_XOE[:3], routing, num_sms=1)
    with pytest.raises(ConfigError, match="alike"):
        gated_gemm(hidden_TE.bfloat16(), gate_up_XOE, routing, num_sms=1)
    with pytest.raises(ConfigError, match=r"the output is .*; it must be|it must be \[18, 16\]"):
        scattered_gemm(torch.randn(18, 16, device=device), down_XEF, routing, num_sms=1, output=hidden_TE)
    with pytest.raises(ConfigError, match="num_sms is 0"):
        gated_gemm(hidden_TE, gate_up_XOE, routing, num_sms=0)


def test_tiles_are_chosen_by_the_copies_of_an_expert() -> None:
    mixtral_prefill = choose_grouped_config(2 * 2048, 8, 14336, 4096, 132, is_gated=True)
    assert mixtral_prefill is GATED_CANDIDATES[0]
    assert choose_grouped_config(2 * 2048, 8, 4096, 14336, 132, is_gated=False) is PLAIN_CANDIDATES[0]
    few_each = choose_grouped_config(8 * 256, 128, 768, 2048, 132, is_gated=True)  # 16 copies for each of 128 experts
    assert few_each.rows == 64
    assert expected_row_tiles(0, 8, 128) == 0
    assert expected_row_tiles(3, 8, 128) == 3
    assert expected_row_tiles(4096, 8, 128) == 32
    assert expected_row_tiles(4097, 8, 128) == 40


def test_every_candidate_fits_into_shared_memory() -> None:
    gated = [(config.rows + 2 * config.columns) * config.inner_bytes * config.num_stages for config in GATED_CANDIDATES]
    assert max(gated) + 1024 <= LARGEST_SHARED_BYTES
    assert max(config.stage_bytes() for config in PLAIN_CANDIDATES) + 1024 <= LARGEST_SHARED_BYTES
