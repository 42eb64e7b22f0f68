"""silu(gate) * up of fused columns, the gate's first, in the activations' dtype or as e4m3 with a scale per token.

As `engine.layers.activation`: silu in float32, rounded to the dtype before it meets `up`. e4m3 values are those of the
rounded result, `quantise.quantise_rows(silu_mul(...))` without writing and reading it.

Bound: memory. Llama-3-8B, 2,048 tokens of 2 * 14,336 bfloat16 columns: 176 MB read and written, 44 us at 4 TB/s; to
e4m3 147 MB, 37 us (apart they would be 264 MB). Without quantising, tiles of 2,048 columns need nothing of each other:
128 threads, 16 columns each, in two loads of 16 bytes from either half. To e4m3 a program holds a row, of which the
largest magnitude is wanted: 16,384 places for 14,336 columns, 512 threads of 32 columns each.

Legend: T tokens, F columns of the result.
"""

import triton
import triton.language as tl
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.gpu.narrowing import narrow
from engine.kernels.gpu.quantise import quantised_outputs, scaled_to_e4m3
from engine.kernels.gpu.row_launch import RowLaunch, check_argument, check_floating, limited, stages_of

_TILE = 2048
_TILE_WARPS = 4


def silu_mul(gate_up_TF: Tensor, output_TF: Tensor | None = None, *, num_ctas: int | None = None) -> Tensor:
    """[T, 2 F] -> [T, F]."""
    num_rows, width = _sizes(gate_up_TF)
    if output_TF is None:
        output_TF = gate_up_TF.new_empty(num_rows, width)
    check_argument("output_TF", output_TF, (num_rows, width), gate_up_TF.dtype)
    block = min(_TILE, 1 << max(width - 1, 0).bit_length())
    num_tiles = num_rows * -(-width // block)
    num_programs = limited(num_tiles, num_ctas)
    if num_programs:
        silu_mul_kernel[(num_programs,)](
            gate_up_TF,
            output_TF,
            num_rows,
            width,
            BLOCK=block,
            STAGES=stages_of(num_tiles, num_programs, 2 * block * gate_up_TF.itemsize),
            num_warps=_TILE_WARPS,
        )
    return output_TF


def silu_mul_fp8(
    gate_up_TF: Tensor, output_TF: Tensor | None = None, scales_T: Tensor | None = None, *, num_ctas: int | None = None
) -> tuple[Tensor, Tensor]:
    """As `silu_mul`, quantised: e4m3 values [T, F] and float32 scales [T]."""
    num_rows, width = _sizes(gate_up_TF)
    output_TF, scales_T = quantised_outputs(gate_up_TF, width, output_TF, scales_T)
    launch = RowLaunch.of(num_rows, width, num_ctas, 2 * gate_up_TF.itemsize)
    if launch.num_programs:
        silu_mul_fp8_kernel[(launch.num_programs,)](
            gate_up_TF,
            output_TF,
            scales_T,
            num_rows,
            width,
            BLOCK=launch.block,
            STAGES=launch.num_stages,
            num_warps=launch.num_warps,
        )
    return output_TF, scales_T


def _sizes(gate_up_TF: Tensor) -> tuple[int, int]:
    """T and F."""
    check_floating("gate_up_TF", gate_up_TF, 2)
    num_rows, num_columns = gate_up_TF.shape
    if num_columns % 2:
        raise ConfigError(f"gate_up_TF has {num_columns} columns: as many of the gate as of up are right.")
    return num_rows, num_columns // 2


@triton.jit
def _gated(gate_up: tl.tensor, first: tl.tensor, columns: tl.tensor, width: tl.tensor) -> tl.tensor:
    """Results of these columns of the row that begins at `first`, in its dtype; zeros beyond its width."""
    dtype = gate_up.dtype.element_ty
    inside = columns < width
    gate = tl.load(gate_up + first + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + first + width + columns, mask=inside, other=0.0).to(tl.float32)
    silu = narrow(gate / (1.0 + tl.exp(-gate)), dtype).to(tl.float32)
    return narrow(silu * up, dtype)


@triton.jit(do_not_specialize=["num_rows"])
def silu_mul_kernel(
    gate_up: tl.tensor,
    output: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Tiles of a row, one row after the other."""
    num_tiles = tl.cdiv(width, BLOCK)
    for tile in tl.range(tl.program_id(0), num_rows * num_tiles, tl.num_programs(0), num_stages=STAGES):
        start = (tile // num_tiles) * tl.cast(width, tl.int64)
        columns = (tile % num_tiles) * BLOCK + tl.arange(0, BLOCK)
        tl.store(output + start + columns, _gated(gate_up, 2 * start, columns, width), mask=columns < width)


@triton.jit(do_not_specialize=["scales", "num_rows"])
def silu_mul_fp8_kernel(
    gate_up: tl.tensor,
    output: tl.tensor,
    scales: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """One row after the other."""
    columns = tl.arange(0, BLOCK)
    for row in tl.range(tl.program_id(0), num_rows, tl.num_programs(0), num_stages=STAGES):
        start = row * tl.cast(width, tl.int64)
        quantised, scale = scaled_to_e4m3(_gated(gate_up, 2 * start, columns, width).to(tl.float32))
        tl.store(output + start + columns, quantised, mask=columns < width)
        tl.store(scales + row, scale)
