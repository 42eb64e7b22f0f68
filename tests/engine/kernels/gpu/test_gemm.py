from itertools import product

import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.gpu.gemm import gemm
from engine.kernels.gpu.gemm_config import CANDIDATES, CORESIDENT, GemmConfig

# Tiles small enough for the interpreter, of the same kernel: many tiles, groups and edges at tiny shapes.
SMALL = GemmConfig(rows=16, columns=32, num_warps=4, num_stages=3, group=3, epilogue_parts=2, inner_bytes=64)


def random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device)


def expected(a_TK: Tensor, b_NK: Tensor, *added: Tensor) -> Tensor:
    return sum((tensor.double() for tensor in added), a_TK.double() @ b_NK.double().T)


def assert_rounded(actual: Tensor, exact: Tensor, num_inner: int) -> None:
    """Equal but for one rounding to the type of the output and float32 sums of `num_inner` products."""
    tolerance = 2e-6 * num_inner**0.5
    step = torch.finfo(actual.dtype).eps / 2
    torch.testing.assert_close(actual.double(), exact, rtol=step + 1e-6, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow), torch.float32])
@pytest.mark.parametrize(
    ("rows", "columns", "inner"),
    [(50, 70, 72), (16, 32, 32), (1, 8, 16), pytest.param(97, 33, 200, marks=pytest.mark.slow)],
)
def test_gemm_equals_the_product(rows: int, columns: int, inner: int, dtype: torch.dtype, device: torch.device) -> None:
    a_TK = random(rows, inner, dtype=dtype, device=device)
    b_NK = random(columns, inner, dtype=dtype, device=device)
    for num_sms in (1, 3, 100):
        assert_rounded(gemm(a_TK, b_NK, num_sms=num_sms, config=SMALL), expected(a_TK, b_NK), inner)


@pytest.mark.parametrize(("with_bias", "with_residual"), list(product((False, True), repeat=2)))
def test_bias_and_residual_are_added_before_the_one_rounding(
    with_bias: bool, with_residual: bool, device: torch.device
) -> None:
    a_TK = random(37, 64, dtype=torch.bfloat16, device=device)
    b_NK = random(50, 64, dtype=torch.bfloat16, device=device)
    bias_N = random(50, dtype=torch.bfloat16, device=device) if with_bias else None
    residual_TN = random(37, 50, dtype=torch.bfloat16, device=device) if with_residual else None
    actual = gemm(a_TK, b_NK, num_sms=4, bias_N=bias_N, residual_TN=residual_TN, config=SMALL)
    added = [tensor for tensor in (bias_N, residual_TN) if tensor is not None]
    assert_rounded(actual, expected(a_TK, b_NK, *added), 64)


def test_output_may_be_the_residual_and_a_part_of_a_larger_matrix(device: torch.device) -> None:
    a_TK = random(40, 32, dtype=torch.bfloat16, device=device)
    b_NK = random(48, 32, dtype=torch.bfloat16, device=device)
    wide = random(44, 64, dtype=torch.bfloat16, device=device)
    before = wide.clone()
    part = wide[2:42, 8:56]
    exact = expected(a_TK, b_NK, part)
    assert gemm(a_TK, b_NK, num_sms=2, residual_TN=part, output=part, config=SMALL) is part
    assert_rounded(part, exact, 32)
    untouched = torch.ones_like(wide, dtype=torch.bool)
    untouched[2:42, 8:56] = False
    torch.testing.assert_close(wide[untouched], before[untouched], rtol=0, atol=0)


def test_a_float32_output_keeps_what_bfloat16_would_round(device: torch.device) -> None:
    a_TK = random(20, 96, dtype=torch.bfloat16, device=device)
    b_NK = random(40, 96, dtype=torch.bfloat16, device=device)
    output = torch.empty(20, 40, device=device)
    gemm(a_TK, b_NK, num_sms=2, output=output, config=SMALL)
    assert_rounded(output, expected(a_TK, b_NK), 96)


def test_the_number_of_programs_does_not_change_a_bit(device: torch.device) -> None:
    a_TK = random(60, 64, dtype=torch.bfloat16, device=device)
    b_NK = random(100, 64, dtype=torch.bfloat16, device=device)
    outputs = [gemm(a_TK, b_NK, num_sms=num_sms, config=SMALL) for num_sms in (1, 5, 132)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [*CANDIDATES, CORESIDENT], ids=lambda config: f"{config.rows}x{config.columns}x{config.num_stages}"
)
def test_every_candidate_computes(config: GemmConfig, device: torch.device) -> None:
    a_TK = random(130, 136, dtype=torch.bfloat16, device=device)
    b_NK = random(264, 136, dtype=torch.bfloat16, device=device)
    residual_TN = random(130, 264, dtype=torch.bfloat16, device=device)
    actual = gemm(a_TK, b_NK, num_sms=3, residual_TN=residual_TN, config=config)
    assert_rounded(actual, expected(a_TK, b_NK, residual_TN), 136)


def test_rows_of_a_larger_matrix_are_an_operand(device: torch.device) -> None:
    a_TK = random(30, 64, dtype=torch.bfloat16, device=device)[3:21, 8:40]
    b_NK = random(24, 32, dtype=torch.bfloat16, device=device)
    assert_rounded(gemm(a_TK, b_NK, num_sms=2), expected(a_TK, b_NK), 32)


def test_no_rows_are_no_launch(device: torch.device) -> None:
    a_TK = random(0, 64, dtype=torch.bfloat16, device=device)
    b_NK = random(24, 64, dtype=torch.bfloat16, device=device)
    assert gemm(a_TK, b_NK, num_sms=2).shape == (0, 24)


def test_operands_that_do_not_fit_are_refused(device: torch.device) -> None:
    def half(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.bfloat16, device=device)

    with pytest.raises(ConfigError, match="inner sizes must be equal"):
        gemm(half(8, 32), half(8, 16), num_sms=1)
    with pytest.raises(ConfigError, match="multiples of 16 bytes"):
        gemm(half(8, 12), half(8, 12), num_sms=1)
    with pytest.raises(ConfigError, match="adjacent columns"):
        gemm(half(32, 8).T, half(8, 32), num_sms=1)
    with pytest.raises(ConfigError, match=r"output is \[8, 9\]"):
        gemm(half(8, 16), half(8, 16), num_sms=1, output=half(8, 9))
    with pytest.raises(ConfigError, match=r"bias are \[9\]"):
        gemm(half(8, 16), half(8, 16), num_sms=1, bias_N=half(9))
    with pytest.raises(ConfigError, match="num_sms is 0"):
        gemm(half(8, 16), half(8, 16), num_sms=0)
    with pytest.raises(ConfigError, match="alike"):
        gemm(half(8, 16), half(8, 16).float(), num_sms=1)


@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (5, 0), (0, 0)])
def test_a_product_without_rows_or_columns_is_empty(rows: int, columns: int, device: torch.device) -> None:
    a_TK = random(rows, 16, dtype=torch.bfloat16, device=device)
    b_NK = random(columns, 16, dtype=torch.bfloat16, device=device)
    output_TN = gemm(a_TK, b_NK, num_sms=2)
    assert output_TN.shape == (rows, columns) and output_TN.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"a is \[5, 0\] and b \[8, 0\]; there must be something to multiply"):
        gemm(a_TK.new_empty(5, 16)[:, :0], b_NK.new_empty(8, 16)[:, :0], num_sms=2)
