"""Root-mean-square normalisation, with the residual added before it or not, and e4m3 values after it or not.

As `engine.layers.norm`: statistics in float32, the quotient of narrower activations rounded before it meets the weight;
a residual stream is rounded to its dtype and that is what is normalised. e4m3 values are those of the rounded result,
`quantise.quantise_rows(rms_norm(...))` without writing and reading it.

Bound: memory. Llama-3-8B, 2,048 tokens of 4,096 bfloat16 elements: reads and writes 33.6 MB (8.4 us at 4 TB/s); with
the residual 67.1 MB (16.8 us), which the addition and the norm apart would make 83.9 MB; e4m3 values are 8.4 MB less.
A program holds a row (8 KiB) in registers, 16 elements a thread in two loads of 16 bytes from each input; the weight is
read once per program, from L2.

Legend: T tokens, E hidden.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu.narrowing import narrow
from engine.kernels.gpu.quantise import quantised_outputs, scaled_to_e4m3
from engine.kernels.gpu.row_launch import RowLaunch, check_argument, check_floating


def rms_norm(
    hidden_TE: Tensor,
    weight_E: Tensor,
    epsilon: float,
    output_TE: Tensor | None = None,
    *,
    num_ctas: int | None = None,
) -> Tensor:
    """[T, E] -> [T, E]; `output_TE` may be `hidden_TE`."""
    _check(hidden_TE, weight_E)
    output_TE = _output(hidden_TE, output_TE)
    _launch(hidden_TE, weight_E, epsilon, output_TE, num_ctas=num_ctas)
    return output_TE


def rms_norm_fp8(
    hidden_TE: Tensor,
    weight_E: Tensor,
    epsilon: float,
    output_TE: Tensor | None = None,
    scales_T: Tensor | None = None,
    *,
    num_ctas: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `rms_norm`, quantised: e4m3 values [T, E] and float32 scales [T]."""
    _check(hidden_TE, weight_E)
    output_TE, scales_T = quantised_outputs(hidden_TE, hidden_TE.shape[1], output_TE, scales_T)
    _launch(hidden_TE, weight_E, epsilon, output_TE, scales_T=scales_T, num_ctas=num_ctas)
    return output_TE, scales_T


def add_rms_norm(
    hidden_TE: Tensor,
    residual_TE: Tensor,
    weight_E: Tensor,
    epsilon: float,
    output_TE: Tensor | None = None,
    *,
    new_residual_TE: Tensor | None = None,
    num_ctas: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm of hidden + residual, and that sum: [T, E] each. The sum is in place of `residual_TE` by default."""
    new_residual_TE = _check_residual(hidden_TE, residual_TE, weight_E, new_residual_TE)
    output_TE = _output(hidden_TE, output_TE)
    residuals = residual_TE, new_residual_TE
    _launch(hidden_TE, weight_E, epsilon, output_TE, residuals=residuals, num_ctas=num_ctas)
    return output_TE, new_residual_TE


def add_rms_norm_fp8(
    hidden_TE: Tensor,
    residual_TE: Tensor,
    weight_E: Tensor,
    epsilon: float,
    output_TE: Tensor | None = None,
    scales_T: Tensor | None = None,
    *,
    new_residual_TE: Tensor | None = None,
    num_ctas: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `add_rms_norm`, quantised: e4m3 values [T, E], float32 scales [T] and the new residual [T, E]."""
    new_residual_TE = _check_residual(hidden_TE, residual_TE, weight_E, new_residual_TE)
    output_TE, scales_T = quantised_outputs(hidden_TE, hidden_TE.shape[1], output_TE, scales_T)
    residuals = residual_TE, new_residual_TE
    _launch(hidden_TE, weight_E, epsilon, output_TE, scales_T=scales_T, residuals=residuals, num_ctas=num_ctas)
    return output_TE, scales_T, new_residual_TE


def _check(hidden_TE: Tensor, weight_E: Tensor) -> None:
    check_floating("hidden_TE", hidden_TE, 2)
    check_argument("weight_E", weight_E, (hidden_TE.shape[1],), hidden_TE.dtype)


def _check_residual(hidden_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, new_residual_TE: Tensor | None) -> Tensor:
    """Where the new residual goes."""
    _check(hidden_TE, weight_E)
    check_argument("residual_TE", residual_TE, tuple(hidden_TE.shape), hidden_TE.dtype)
    if new_residual_TE is None:
        return residual_TE
    check_argument("new_residual_TE", new_residual_TE, tuple(hidden_TE.shape), hidden_TE.dtype)
    return new_residual_TE


def _output(hidden_TE: Tensor, output_TE: Tensor | None) -> Tensor:
    if output_TE is None:
        return torch.empty_like(hidden_TE)
    check_argument("output_TE", output_TE, tuple(hidden_TE.shape), hidden_TE.dtype)
    return output_TE


def _launch(
    hidden_TE: Tensor,
    weight_E: Tensor,
    epsilon: float,
    output_TE: Tensor,
    *,
    scales_T: Tensor | None = None,
    residuals: tuple[Tensor, Tensor] | None = None,
    num_ctas: int | None,
) -> None:
    num_rows, width = hidden_TE.shape
    launch = RowLaunch.of(num_rows, width, num_ctas, (1 if residuals is None else 2) * hidden_TE.itemsize)
    if not launch.num_programs:
        return
    old_TE, new_TE = residuals or (hidden_TE, hidden_TE)  # stand for what is not looked at
    rms_norm_kernel[(launch.num_programs,)](
        hidden_TE,
        old_TE,
        new_TE,
        weight_E,
        output_TE,
        output_TE if scales_T is None else scales_T,
        num_rows,
        width,
        epsilon,
        ADDS=residuals is not None,
        QUANTISES=scales_T is not None,
        BLOCK=launch.block,
        STAGES=launch.num_stages,
        num_warps=launch.num_warps,
    )


@triton.jit(do_not_specialize=["scales", "num_rows"])
def rms_norm_kernel(
    hidden: tl.tensor,
    residual: tl.tensor,
    new_residual: tl.tensor,
    weight: tl.tensor,
    output: tl.tensor,
    scales: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    epsilon: tl.tensor,
    ADDS: tl.constexpr,
    QUANTISES: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """A row, and then the one as many further on as there are programs."""
    dtype = hidden.dtype.element_ty
    columns_E = tl.arange(0, BLOCK)
    inside_E = columns_E < width
    weight_E = tl.load(weight + columns_E, mask=inside_E, other=0.0).to(tl.float32)
    for row in tl.range(tl.program_id(0), num_rows, tl.num_programs(0), num_stages=STAGES):
        places_E = row * tl.cast(width, tl.int64) + columns_E
        hidden_E = tl.load(hidden + places_E, mask=inside_E, other=0.0).to(tl.float32)
        if ADDS:
            hidden_E += tl.load(residual + places_E, mask=inside_E, other=0.0).to(tl.float32)
            sum_E = narrow(hidden_E, dtype)
            tl.store(new_residual + places_E, sum_E, mask=inside_E)
            hidden_E = sum_E.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(hidden_E * hidden_E, axis=0) / width + epsilon)
        quotient_E = narrow(hidden_E * inverse, dtype).to(tl.float32)
        normed_E = narrow(quotient_E * weight_E, dtype)
        if QUANTISES:
            quantised_E, scale = scaled_to_e4m3(normed_E.to(tl.float32))
            tl.store(output + places_E, quantised_E, mask=inside_E)
            tl.store(scales + row, scale)
        else:
            tl.store(output + places_E, normed_E, mask=inside_E)
