"""Casts give the same bits as torch's, in the interpreter too, which on its own rounds otherwise."""

# mypy: disable-error-code="untyped-decorator"

import pytest
import torch
import triton
import triton.language as tl

from engine.kernels.gpu.narrowing import LARGEST_E4M3, narrow

SIZE = 1 << 14


@triton.jit
def _narrow_all(values: tl.tensor, output: tl.tensor, SIZE: tl.constexpr) -> None:
    places = tl.arange(0, SIZE)
    tl.store(output + places, narrow(tl.load(values + places), output.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32])
def test_values_of_all_sizes_are_rounded_as_by_torch(device: torch.device, dtype: torch.dtype) -> None:
    values = torch.randn(SIZE) * torch.exp2(torch.randint(-20, 9, (SIZE,)).float())
    ties = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0.0).sort().values
    values[:255] = (ties[1:] + ties[:-1]) / 2  # half way between neighbours
    values[255:260] = torch.tensor([0.0, -0.0, 448.0, -448.0, 2.0**-10])
    values = values.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(device)
    output = torch.empty(SIZE, dtype=dtype, device=device)
    _narrow_all[(1,)](values, output, SIZE)
    assert torch.equal(output.view(torch.uint8), values.to(dtype).view(torch.uint8))


def test_what_is_too_large_for_e4m3_is_its_largest_value(device: torch.device) -> None:
    values = torch.full((SIZE,), 448.1, device=device)
    values[1], values[2], values[3] = -1e30, float("inf"), float("nan")
    output = torch.empty(SIZE, dtype=torch.float8_e4m3fn, device=device)
    _narrow_all[(1,)](values, output, SIZE)
    assert output[:3].tolist() == [448.0, -448.0, 448.0]
    assert output[3].isnan()
