"""Packed weights compute what plain ones do."""

import pytest
import torch

from engine.kernels import packed
from engine.layers.linear import Linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_packed_product_is_the_plain_one(dtype: torch.dtype, bias: bool) -> None:
    linear = Linear(48, 40, bias=bias).to(dtype)
    for parameter in linear.parameters():
        parameter.normal_()
    inputs = [torch.randn(num_tokens, 48).to(dtype) for num_tokens in (1, 2, 33, 300)]
    inputs.append(torch.randn(5, 96).to(dtype)[:, :48])
    expected = [linear(rows) for rows in inputs]
    work = linear.weight.shape
    linear.pack()
    assert linear.weight.is_mkldnn and linear.weight.shape == work
    for rows, plain in zip(inputs, expected, strict=True):
        torch.testing.assert_close(linear(rows), plain)
        output = torch.empty_like(plain)
        linear.into(output, rows)
        assert torch.equal(output, linear(rows))


def test_what_has_no_layout_stays_as_it_is() -> None:
    linear = Linear(8, 8).to(torch.float64)
    linear.pack()
    assert not linear.weight.is_mkldnn
    assert not packed.can_pack(torch.empty(8, 8, device="meta"))
