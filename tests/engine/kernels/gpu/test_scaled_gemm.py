import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.gpu.gemm_config import GemmConfig
from engine.kernels.gpu.quantise import quantise_rows_reference
from engine.kernels.gpu.scaled_gemm import _library_gemm, library_takes, scaled_gemm, scaled_gemm_reference

SMALL = GemmConfig(rows=16, columns=32, num_warps=4, num_stages=3, group=3, epilogue_parts=2, inner_bytes=32)
Quantised = tuple[Tensor, Tensor, Tensor, Tensor]


def quantised(rows: int, columns: int, inner: int, device: torch.device) -> Quantised:
    """Rows and channels of very different sizes, so that no scale could be confused with another."""
    sizes = torch.exp2(torch.randint(-6, 7, (rows, 1)).float())
    a_TK, a_scales_T = quantise_rows_reference(torch.randn(rows, inner) * sizes)
    channels = torch.exp2(torch.randint(-6, 7, (columns, 1)).float())
    b_NK, b_scales_N = quantise_rows_reference(torch.randn(columns, inner) * channels)
    return a_TK.to(device), a_scales_T.to(device), b_NK.to(device), b_scales_N.to(device)


def exact(operands: Quantised) -> Tensor:
    a_TK, a_scales_T, b_NK, b_scales_N = operands
    return (a_TK.double() * a_scales_T.double()[:, None]) @ (b_NK.double() * b_scales_N.double()[:, None]).T


def sizes_of_sums(operands: Quantised) -> Tensor:
    """What a sum of absolute products would be: the measure of its rounding errors."""
    a_TK, a_scales_T, b_NK, b_scales_N = operands
    return (a_TK.double().abs() @ b_NK.double().abs().T) * a_scales_T.double()[:, None] * b_scales_N.double()


def assert_within(
    actual: Tensor, expected: Tensor, operands: Quantised, device: torch.device, added_sizes: float = 0.0
) -> None:
    """One rounding to the output's type, and sums of float32; the tensor cores' have 14 bits."""
    of_sums = 2.0**-12 if device.type == "cuda" else 2.0**-21
    allowed = expected.abs() * torch.finfo(actual.dtype).eps / 2 * 1.01 + sizes_of_sums(operands) * of_sums
    assert bool(((actual.double() - expected).abs() <= allowed + added_sizes * 2.0**-22).all())


@pytest.mark.parametrize("num_sms", [None, 1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns", "inner"), [(37, 48, 80), (1, 16, 32), (16, 70, 48), (70, 33, 16)])
def test_every_variant_equals_the_exact_product(
    rows: int, columns: int, inner: int, dtype: torch.dtype, num_sms: int | None, device: torch.device
) -> None:
    operands = quantised(rows, columns, inner, device)
    config = SMALL if num_sms else None
    actual = scaled_gemm(*operands, output_dtype=dtype, num_sms=num_sms, config=config)
    assert actual.dtype is dtype
    assert_within(actual, exact(operands), operands, device)


@pytest.mark.parametrize("num_sms", [None, 3])
def test_bias_and_residual_are_not_scaled(num_sms: int | None, device: torch.device) -> None:
    operands = quantised(20, 32, 64, device)
    bias_N = torch.randn(32, device=device)
    residual_TN = torch.randn(20, 32, device=device)
    output = torch.empty(20, 32, device=device)
    actual = scaled_gemm(*operands, bias_N=bias_N, residual_TN=residual_TN, output=output, num_sms=num_sms)
    assert actual is output
    expected = exact(operands) + bias_N + residual_TN
    assert_within(actual, expected, operands, device, added_sizes=float(bias_N.abs().max() + residual_TN.abs().max()))


@pytest.mark.parametrize("num_sms", [None, 2])
def test_the_output_may_be_the_residual(num_sms: int | None, device: torch.device) -> None:
    operands = quantised(20, 32, 64, device)
    stream = torch.randn(20, 32, device=device)
    expected = exact(operands) + stream
    size = float(stream.abs().max())
    assert scaled_gemm(*operands, residual_TN=stream, output=stream, num_sms=num_sms) is stream
    assert_within(stream, expected, operands, device, added_sizes=size)


@pytest.mark.parametrize("given", ["nothing", "an output", "the residual"])
def test_what_the_library_writes_over_is_not_the_residual(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its product is written before the residual is read; where there is no GPU, something stands for it."""

    def product(a_TK: Tensor, b_KN: Tensor, a_T1: Tensor, b_1N: Tensor, *, out: Tensor, **_: object) -> Tensor:
        return out.copy_(scaled_gemm_reference(a_TK, a_T1, b_KN.T, b_1N, output_dtype=out.dtype))

    monkeypatch.setattr(torch, "_scaled_mm", product)
    operands = quantised(20, 32, 64, torch.device("cpu"))
    stream = torch.randn(20, 32)
    expected = scaled_gemm_reference(*operands, output_dtype=torch.float32) + stream
    output = {"nothing": None, "an output": torch.empty(20, 32), "the residual": stream}[given]
    actual = _library_gemm(*operands, None, stream, output, torch.float32)
    assert output is None or actual is output
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_every_stored_value_takes_part(device: torch.device) -> None:
    """All 254 finite e4m3 values, times one: the widening of each is exact, subnormal ones included."""
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F] + [0, 0], dtype=torch.uint8)
    values_TK = codes.view(torch.float8_e4m3fn)[:, None].repeat(1, 16).to(device)
    one_NK = torch.zeros(8, 16)
    one_NK[:, 0] = 1
    ones_T, ones_N = torch.ones(256, device=device), torch.ones(8, device=device)
    actual = scaled_gemm(
        values_TK, ones_T, one_NK.to(torch.float8_e4m3fn).to(device), ones_N, output_dtype=torch.float32, num_sms=2
    )
    torch.testing.assert_close(actual, values_TK.float()[:, :1].expand(256, 8), rtol=0, atol=0)


def test_the_reference_is_the_exact_product_too(device: torch.device) -> None:
    operands = quantised(9, 24, 40, device)
    assert_within(scaled_gemm_reference(*operands), exact(operands), operands, device)


def test_what_cublaslt_does_not_take() -> None:
    values = torch.zeros(32, 64, dtype=torch.float8_e4m3fn)
    bias_N = torch.zeros(32, dtype=torch.bfloat16)
    assert library_takes(values, values, None, None, torch.float32)
    assert library_takes(values, values, bias_N, None, torch.bfloat16)
    assert not library_takes(values, values, bias_N, None, torch.float32)
    assert not library_takes(values, values[:0], None, None, torch.bfloat16)
    assert not library_takes(values[:0], values, None, None, torch.bfloat16)
    assert not library_takes(values, values[:30], None, None, torch.bfloat16)
    assert not library_takes(values[:, :24], values[:, :24], None, None, torch.bfloat16)
    assert not library_takes(values, values, None, torch.zeros(32, 40)[:, :32], torch.float32)


def test_operands_that_do_not_fit_are_refused(device: torch.device) -> None:
    a_TK, a_scales_T, b_NK, b_scales_N = quantised(8, 16, 32, device)
    with pytest.raises(ConfigError, match=r"a is .* of torch.float32; it must be a matrix of float8_e4m3fn"):
        scaled_gemm(a_TK.float(), a_scales_T, b_NK, b_scales_N)
    with pytest.raises(ConfigError, match=r"scales of b are \[8\] .* must be 16 adjacent float32"):
        scaled_gemm(a_TK, a_scales_T, b_NK, a_scales_T)
    with pytest.raises(ConfigError, match="inner sizes must be equal"):
        scaled_gemm(a_TK[:, :16], a_scales_T, b_NK, b_scales_N)
