"""Matrix products in FP8 as layers call them: activations are quantised per token, weights were per output channel.

On a GPU by the kernels of `engine.kernels.gpu`, which wait for nothing; elsewhere by their references, for tests alone:
who may have FP8 is decided by `engine.fp8_support`. Legend: T tokens, I inputs, O outputs; X experts, S rows sorted by
expert.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels.row_scales import quantise_rows_reference, scaled_gemm_reference

# Where torch has grouped products with a scale per row: Hopper and the data-centre Blackwells.
_GROUPED_CAPABILITIES = ((9, 0), (10, 0))
_GROUPED_MULTIPLE = 16


class QuantisedRows(NamedTuple):
    """Activations as e4m3 values [T, E] and float32 scales [T], which are of `dtype` everywhere else."""

    values: Tensor
    scales: Tensor
    dtype: torch.dtype


def fp8_product(
    input_TI: Tensor, weight_OI: Tensor, scales_O: Tensor, bias_O: Tensor | None = None, output_TO: Tensor | None = None
) -> Tensor:
    """[T, I] -> [T, O] in the input's dtype, in `output_TO` if given."""
    if input_TI.shape[0] == 0:
        return input_TI.new_empty(0, weight_OI.shape[0]) if output_TO is None else output_TO
    rows = QuantisedRows(*quantised(input_TI), input_TI.dtype)
    return product_of_quantised(rows, weight_OI, scales_O, bias_O, output_TO)


def product_of_quantised(
    rows: QuantisedRows,
    weight_OI: Tensor,
    scales_O: Tensor,
    bias_O: Tensor | None = None,
    output_TO: Tensor | None = None,
) -> Tensor:
    """The same of an input that is quantised already, by what made it: [T, I] -> [T, O]."""
    values_TI, scales_T, dtype = rows
    if output_TO is None:
        output_TO = values_TI.new_empty(values_TI.shape[0], weight_OI.shape[0], dtype=dtype)
    if values_TI.shape[0] == 0:
        return output_TO
    if not values_TI.is_cuda:
        result = scaled_gemm_reference(values_TI, scales_T, weight_OI, scales_O, bias_O, output_dtype=dtype)
        return output_TO.copy_(result)
    from engine.kernels.gpu.scaled_gemm import scaled_gemm

    return scaled_gemm(values_TI, scales_T, weight_OI, scales_O, bias_N=bias_O, output=output_TO)


def grouped_fp8_product(sorted_SI: Tensor, weight_XOI: Tensor, scales_XO: Tensor, ends_X: Tensor) -> Tensor:
    """Multiply rows ends[x - 1] .. ends[x] - 1 by the transpose of weight[x]: [S, I] -> [S, O].

    Where torch has no such product, a loop over the experts reads `ends` on the host, which then waits for the device.
    """
    if _has_grouped_product(sorted_SI, weight_XOI):
        values_SI, scales_S = quantised(sorted_SI)
        return torch_grouped_product(values_SI, scales_S, weight_XOI, scales_XO, ends_X)
    output_SO = sorted_SI.new_empty(sorted_SI.shape[0], weight_XOI.shape[1])
    start = 0
    for expert, end in enumerate(ends_X.tolist()):
        if end > start:
            fp8_product(sorted_SI[start:end], weight_XOI[expert], scales_XO[expert], output_TO=output_SO[start:end])
        start = end
    return output_SO


def torch_grouped_product(
    values_SI: Tensor, scales_S: Tensor, weight_XOI: Tensor, scales_XO: Tensor, ends_X: Tensor
) -> Tensor:
    """The same of rows that are quantised already, by torch, to bfloat16: it reads `ends` on the device."""
    return torch._scaled_grouped_mm(
        values_SI,
        weight_XOI.transpose(1, 2),
        scales_S,
        scales_XO,
        offs=ends_X,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def quantised(hidden_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Values [T, E] float8_e4m3fn and the scale of each token, [T] float32."""
    if not hidden_TE.is_cuda:
        return quantise_rows_reference(hidden_TE)
    from engine.kernels.gpu.quantise import quantise_rows

    return quantise_rows(hidden_TE)


def _has_grouped_product(sorted_SI: Tensor, weight_XOI: Tensor) -> bool:
    return (
        sorted_SI.is_cuda
        and sorted_SI.dtype is torch.bfloat16
        and all(size % _GROUPED_MULTIPLE == 0 for size in weight_XOI.shape[1:])
        and torch.cuda.get_device_capability(sorted_SI.device) in _GROUPED_CAPABILITIES
    )
