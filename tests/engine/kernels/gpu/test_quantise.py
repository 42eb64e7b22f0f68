"""e4m3 per row: the kernel against plain torch to the bit, and what is lost by it."""

import pytest
import torch

from engine.errors import ConfigError
from engine.kernels.gpu.quantise import dequantise_rows, quantise_rows, quantise_rows_reference, quantise_weight


@pytest.mark.parametrize("num_ctas", [None, 1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_quantised_as_in_plain_torch(device: torch.device, dtype: torch.dtype, num_ctas: int | None) -> None:
    hidden_TE = (torch.randn(5, 200) * torch.exp2(torch.randint(-12, 8, (5, 200)).float())).to(dtype).to(device)
    hidden_TE[2] = 0
    hidden_TE[3, 1:] = 0
    values_TE, scales_T = quantise_rows(hidden_TE, num_ctas=num_ctas)
    expected_TE, expected_T = quantise_rows_reference(hidden_TE)
    assert torch.equal(values_TE.view(torch.uint8), expected_TE.view(torch.uint8))
    assert torch.equal(scales_T, expected_T)
    assert scales_T[2] > 0
    assert not values_TE[2].float().any()


def test_nothing_is_lost_beyond_three_bits_of_mantissa_and_the_smallest_step(device: torch.device) -> None:
    hidden_TE = torch.randn(4, 130, device=device)
    values_TE, scales_T = quantise_rows(hidden_TE)
    error_TE = (dequantise_rows(values_TE, scales_T) - hidden_TE).abs()
    assert bool((error_TE <= hidden_TE.abs() * 2**-4 * 1.001 + scales_T[:, None] * 2**-10).all())


def test_a_product_with_a_quantised_weight_is_nearly_the_product(device: torch.device) -> None:
    """Channels of any size keep three bits of mantissa: an error of some 2.5 % in each value, less in their sums."""
    weight_OI = torch.randn(48, 256, device=device) * torch.logspace(-3, 3, 48, device=device)[:, None]
    hidden_TI = torch.randn(512, 256, device=device)
    values_OI, scales_O = quantise_weight(weight_OI)
    expected_TO = hidden_TI @ weight_OI.T
    given_TO = (hidden_TI @ values_OI.float().T) * scales_O
    error_O = (given_TO - expected_TO).norm(dim=0) / expected_TO.norm(dim=0)
    assert bool((error_O < 0.06).all())
    assert bool(((dequantise_rows(values_OI, scales_O) - weight_OI).norm(dim=1) < 0.04 * weight_OI.norm(dim=1)).all())


def test_given_buffers_are_used_and_no_rows_are_no_work(device: torch.device) -> None:
    hidden_TE = torch.randn(3, 16, device=device)
    output_TE = torch.zeros(3, 16, dtype=torch.float8_e4m3fn, device=device)
    scales_T = torch.zeros(3, device=device)
    assert quantise_rows(hidden_TE, output_TE, scales_T)[0] is output_TE
    assert bool((scales_T > 0).all())
    assert quantise_rows(hidden_TE[:0])[0].shape == (0, 16)


def test_wrong_buffers_are_named(device: torch.device) -> None:
    hidden_TE = torch.randn(3, 16, device=device)
    with pytest.raises(ConfigError, match=r"output_TE is torch.float32, where torch.float8_e4m3fn is right"):
        quantise_rows(hidden_TE, torch.zeros(3, 16, device=device))
    with pytest.raises(ConfigError, match=r"hidden_TE is torch.float64"):
        quantise_rows(hidden_TE.double())
    with pytest.raises(ConfigError, match=r"hidden_TE has strides \(1, 3\)"):
        quantise_rows(hidden_TE.T.contiguous().T)
    with pytest.raises(ConfigError, match=r"num_ctas is 0"):
        quantise_rows(hidden_TE, num_ctas=0)
