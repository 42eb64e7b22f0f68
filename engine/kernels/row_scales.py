"""e4m3 with one float32 scale per row, in plain torch: a value is stored * scale, scale = the row's largest / 448.

Rows are the tokens of an activation and the output channels of a weight. What the kernels of `engine.kernels.gpu` are
compared with, what weights are quantised with at load, and what computes where a test runs FP8 without a device that
has it. Legend: T tokens (rows), E elements of a row; N outputs, K inner of a product.
"""

import torch
from torch import Tensor
from torch.nn import functional

LARGEST_E4M3 = 448.0
# A row of zeros has a scale too, of which the reciprocal is finite.
SMALLEST_MAXIMUM = 1e-12
# Of float32 copies while a weight is quantised: a part of it at a time.
_LARGEST_PART = 2**24


def quantise_rows_reference(hidden_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Values [T, E] float8_e4m3fn and their scales [T] float32."""
    wide_TE = hidden_TE.float()
    scales_T = wide_TE.abs().amax(-1).clamp(min=SMALLEST_MAXIMUM) / LARGEST_E4M3
    scaled_TE = (wide_TE * scales_T.reciprocal()[:, None]).clamp(-LARGEST_E4M3, LARGEST_E4M3)
    return scaled_TE.to(torch.float8_e4m3fn), scales_T


def quantise_into(values: Tensor, scales: Tensor, weight: Tensor) -> None:
    """Fill values [..., E] and scales [...] from a weight [..., E] on any device, a few rows at a time."""
    width = weight.shape[-1]
    num_rows = max(1, _LARGEST_PART // width)
    if values.dim() > 2:
        for each in zip(values, scales, weight, strict=True):
            quantise_into(*each)
        return
    for first in range(0, len(weight), num_rows):
        part = slice(first, first + num_rows)
        values[part], scales[part] = quantise_rows_reference(weight[part].to(values.device))


def dequantise_rows(values_TE: Tensor, scales_T: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the values stand for."""
    return (values_TE.float() * scales_T[:, None]).to(dtype)


def scaled_gemm_reference(
    a_TK: Tensor,
    a_scales_T: Tensor,
    b_NK: Tensor,
    b_scales_N: Tensor,
    bias_N: Tensor | None = None,
    residual_TN: Tensor | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """(a b^T) * scale of the token * scale of the channel + bias + residual, summed in float32."""
    sums_TN = functional.linear(a_TK.float(), b_NK.float())
    sums_TN *= a_scales_T.view(-1, 1) * b_scales_N.view(1, -1)
    for added in (bias_N, residual_TN):
        if added is not None:
            sums_TN += added
    return sums_TN.to(output_dtype)
