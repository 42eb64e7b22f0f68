"""The norm kernel against the layer's function, alone, with the residual, and quantised."""

import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels import fused
from engine.kernels.gpu.norm import add_rms_norm, add_rms_norm_fp8, rms_norm, rms_norm_fp8
from engine.kernels.gpu.quantise import quantise_rows_reference

EPSILON = 1e-5
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def assert_rounded_alike(given: Tensor, expected: Tensor) -> None:
    """Nearly all equal; where float32's last bit tips the rounding of a quotient, one step of the dtype off."""
    step = torch.finfo(given.dtype).eps
    torch.testing.assert_close(given, expected, rtol=2 * step, atol=1e-6)
    if given.dtype is not torch.float32:
        assert bool((given == expected).float().mean() > 0.99)


@pytest.mark.parametrize("num_ctas", [None, 2])
@pytest.mark.parametrize("width", [64, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_the_layer_s(device: torch.device, dtype: torch.dtype, width: int, num_ctas: int | None) -> None:
    hidden_TE = (torch.randn(5, width) * 3).to(dtype).to(device)
    hidden_TE[1] = 0
    weight_E = torch.randn(width).to(dtype).to(device)
    normed_TE = rms_norm(hidden_TE, weight_E, EPSILON, num_ctas=num_ctas)
    assert_rounded_alike(normed_TE, fused.rms_norm(hidden_TE, weight_E, epsilon=EPSILON))
    assert not normed_TE[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_rounded_before_it_is_normalised_and_replaces_the_residual(
    device: torch.device, dtype: torch.dtype
) -> None:
    hidden_TE, residual_TE = ((torch.randn(4, 96) * 3).to(dtype).to(device) for _ in range(2))
    weight_E = torch.randn(96).to(dtype).to(device)
    sum_TE = hidden_TE + residual_TE
    given_TE = residual_TE.clone()
    normed_TE, new_TE = add_rms_norm(hidden_TE, given_TE, weight_E, EPSILON)
    assert new_TE is given_TE
    assert torch.equal(new_TE, sum_TE)
    assert_rounded_alike(normed_TE, fused.rms_norm(sum_TE, weight_E, epsilon=EPSILON))
    elsewhere_TE, output_TE = torch.empty_like(sum_TE), torch.empty_like(sum_TE)
    add_rms_norm(hidden_TE, residual_TE, weight_E, EPSILON, output_TE, new_residual_TE=elsewhere_TE)
    assert torch.equal(elsewhere_TE, sum_TE)
    assert torch.equal(output_TE, normed_TE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_results_are_the_results_quantised(device: torch.device, dtype: torch.dtype) -> None:
    hidden_TE, residual_TE = (torch.randn(4, 96).to(dtype).to(device) for _ in range(2))
    hidden_TE[2], residual_TE[2] = 0, 0
    weight_E = torch.randn(96).to(dtype).to(device)
    expected = quantise_rows_reference(rms_norm(hidden_TE, weight_E, EPSILON))
    values_TE, scales_T = rms_norm_fp8(hidden_TE, weight_E, EPSILON, num_ctas=3)
    assert torch.equal(values_TE.view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(scales_T, expected[1])

    normed_TE, sum_TE = add_rms_norm(hidden_TE, residual_TE.clone(), weight_E, EPSILON)
    expected = quantise_rows_reference(normed_TE)
    values_TE, scales_T, new_TE = add_rms_norm_fp8(hidden_TE, residual_TE, weight_E, EPSILON)
    assert torch.equal(values_TE.view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(scales_T, expected[1])
    assert torch.equal(new_TE, sum_TE)


def test_no_rows_are_no_work_and_wrong_arguments_are_named(device: torch.device) -> None:
    hidden_TE, weight_E = torch.randn(3, 16, device=device), torch.randn(16, device=device)
    assert rms_norm(hidden_TE[:0], weight_E, EPSILON).shape == (0, 16)
    with pytest.raises(ConfigError, match=r"weight_E has shape \(15,\), where \(16,\) is right"):
        rms_norm(hidden_TE, weight_E[:15], EPSILON)
    with pytest.raises(ConfigError, match=r"residual_TE is torch.bfloat16, where torch.float32 is right"):
        add_rms_norm(hidden_TE, hidden_TE.bfloat16(), weight_E, EPSILON)
