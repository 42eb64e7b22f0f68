"""FP8 GEMM: e4m3 activations with a scale per token times e4m3 weights with a scale per output channel.

Legend: T tokens, N outputs, K inner. The output is (a b^T) * scale of the token * scale of the channel + bias +
residual. 2 T N K flops at up to twice bfloat16's rate with half its bytes, so a tile asks as much per second of L2 as
there. Hopper's FP8 tensor cores keep some 14 bits of a partial sum; both variants let them (fast accumulation), since
quantisation to 3 bits of mantissa loses far more.

Three variants of one function: cublasLt (`torch._scaled_mm`) for the whole device; our persistent kernel for a limited
number of SMs (`num_sms`), which is also what takes shapes cublasLt does not; and plain torch without a GPU.
"""

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.gpu.gemm import launch_gemm
from engine.kernels.gpu.gemm_config import GemmConfig
from engine.kernels.row_scales import scaled_gemm_reference as scaled_gemm_reference

_LIBRARY_MULTIPLE = 16  # cublasLt wants K and N of FP8 operands to be multiples of it


def scaled_gemm(
    a_TK: Tensor,
    a_scales_T: Tensor,
    b_NK: Tensor,
    b_scales_N: Tensor,
    *,
    bias_N: Tensor | None = None,
    residual_TN: Tensor | None = None,
    output: Tensor | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
    num_sms: int | None = None,
    config: GemmConfig | None = None,
) -> Tensor:
    """[T, N] in `output_dtype` (or the type of `output`): bfloat16, float16 or float32.

    Values float8_e4m3fn, scales float32 ([T] or [T, 1], [N] or [N, 1]); `b_NK` as nn.Linear stores it. With `num_sms`
    at most so many programs run, and a configuration may be given; without it the whole device does. The persistent
    kernel adds bias and residual before the one rounding; cublasLt's path adds the residual to the rounded output.
    `output` may be `residual_TN` itself.
    Raises ConfigError where an operand does not fit the others.
    """
    _check(a_TK, a_scales_T, b_NK, b_scales_N)
    dtype = output_dtype if output is None else output.dtype
    if num_sms is not None:
        return launch_gemm(
            a_TK, b_NK, num_sms, residual_TN, bias_N, a_scales_T, b_scales_N, output, dtype, config
        )  # fmt: skip
    if not a_TK.is_cuda:
        result = scaled_gemm_reference(a_TK, a_scales_T, b_NK, b_scales_N, bias_N, residual_TN, dtype)
        return result if output is None else output.copy_(result)
    if not library_takes(a_TK, b_NK, bias_N, output, dtype):
        all_sms = torch.cuda.get_device_properties(a_TK.device).multi_processor_count
        return launch_gemm(a_TK, b_NK, all_sms, residual_TN, bias_N, a_scales_T, b_scales_N, output, dtype, config)
    return _library_gemm(a_TK, a_scales_T, b_NK, b_scales_N, bias_N, residual_TN, output, dtype)


def _library_gemm(
    a_TK: Tensor,
    a_scales_T: Tensor,
    b_NK: Tensor,
    b_scales_N: Tensor,
    bias_N: Tensor | None,
    residual_TN: Tensor | None,
    output: Tensor | None,
    output_dtype: torch.dtype,
) -> Tensor:
    """cublasLt's product, and the residual added to it."""
    # Where the residual is to be replaced, the product must not be written over it before it is added.
    is_in_place = residual_TN is not None and output is not None and output.data_ptr() == residual_TN.data_ptr()
    if output is None or is_in_place:
        product = a_TK.new_empty((a_TK.shape[0], b_NK.shape[0]), dtype=output_dtype)
    else:
        product = output
    torch._scaled_mm(
        a_TK, b_NK.T, a_scales_T.view(-1, 1), b_scales_N.view(1, -1), bias=bias_N, out_dtype=output_dtype,
        use_fast_accum=True, out=product,
    )  # fmt: skip
    if residual_TN is None:
        return product
    return torch.add(product, residual_TN, out=product if output is None else output)


def library_takes(
    a_TK: Tensor, b_NK: Tensor, bias_N: Tensor | None, output: Tensor | None, output_dtype: torch.dtype
) -> bool:
    """Whether `torch._scaled_mm` has this case: something to multiply, K and N multiples of 16, dense operands, a bias
    of the output's type.

    A float32 output has none at all.
    """
    num_columns, num_inner = b_NK.shape
    return (
        a_TK.numel() > 0
        and b_NK.numel() > 0
        and num_inner % _LIBRARY_MULTIPLE == 0
        and num_columns % _LIBRARY_MULTIPLE == 0
        and a_TK.is_contiguous()
        and b_NK.is_contiguous()
        and (output is None or output.is_contiguous())
        and (bias_N is None or (bias_N.dtype == output_dtype and output_dtype is not torch.float32))
    )


def _check(a_TK: Tensor, a_scales_T: Tensor, b_NK: Tensor, b_scales_N: Tensor) -> None:
    """Raise ConfigError unless the values are e4m3 and there is a float32 scale for each of their rows."""
    for name, values, scales in (("a", a_TK, a_scales_T), ("b", b_NK, b_scales_N)):
        if values.dtype is not torch.float8_e4m3fn or values.dim() != 2:
            raise ConfigError(
                f"scaled_gemm: {name} is {list(values.shape)} of {values.dtype}; it must be a matrix of float8_e4m3fn"
            )
        if scales.dtype is not torch.float32 or scales.numel() != values.shape[0] or not scales.is_contiguous():
            raise ConfigError(
                f"scaled_gemm: the scales of {name} are {list(scales.shape)} of {scales.dtype}; "
                f"they must be {values.shape[0]} adjacent float32 numbers, one for each row"
            )
    if a_TK.shape[1] != b_NK.shape[1]:
        raise ConfigError(
            f"scaled_gemm: a is [T, {a_TK.shape[1]}] but b is [N, {b_NK.shape[1]}]; the inner sizes must be equal"
        )
