"""The gate against the layer's function, in tiles and in rows, and quantised."""

import pytest
import torch

from engine.errors import ConfigError
from engine.kernels import fused
from engine.kernels.gpu.activation import silu_mul, silu_mul_fp8
from engine.kernels.gpu.quantise import quantise_rows_reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize(("width", "num_ctas"), [(1, None), (40, None), (64, 2), (2050, 1), (2050, None)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_is_the_layer_s(device: torch.device, dtype: torch.dtype, width: int, num_ctas: int | None) -> None:
    gate_up_TF = (torch.randn(3, 2 * width) * 4).to(dtype).to(device)
    given = silu_mul(gate_up_TF, num_ctas=num_ctas)
    expected = fused.silu_and_mul(gate_up_TF)
    torch.testing.assert_close(given, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    if dtype is not torch.float32 and width > 100:
        assert bool((given == expected).float().mean() > 0.99)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy reports overflows
def test_the_largest_magnitudes_saturate_and_padded_rows_of_zeros_stay_zero(device: torch.device) -> None:
    gate_up_TF = torch.tensor([[-200.0, 200.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]], device=device)
    assert silu_mul(gate_up_TF).tolist() == [[0.0, 600.0], [0.0, 0.0]]


@pytest.mark.parametrize("width", [40, 600])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_results_are_the_results_quantised(device: torch.device, dtype: torch.dtype, width: int) -> None:
    gate_up_TF = torch.randn(4, 2 * width).to(dtype).to(device)
    gate_up_TF[1] = 0
    expected_TF, expected_T = quantise_rows_reference(silu_mul(gate_up_TF))
    values_TF, scales_T = silu_mul_fp8(gate_up_TF, num_ctas=3)
    assert torch.equal(values_TF.view(torch.uint8), expected_TF.view(torch.uint8))
    assert torch.equal(scales_T, expected_T)


def test_no_rows_are_no_work_and_half_a_pair_is_refused(device: torch.device) -> None:
    assert silu_mul(torch.empty(0, 8, device=device)).shape == (0, 4)
    with pytest.raises(ConfigError, match="7 columns"):
        silu_mul(torch.empty(2, 7, device=device))
