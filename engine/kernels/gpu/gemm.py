"""A persistent GEMM with a limited number of programs: [T, K] x [N, K]^T, with bias and residual added in float32.

For overlap: cuBLAS takes the whole device, this takes `num_sms` programs, one per SM, which walk over the tiles; so
attention has the other SMs, or (`gemm_config.CORESIDENT`) the rest of every SM. Elsewhere cublasLt is the default.

Legend: T tokens, N outputs, K inner. 2 T N K flops. From HBM: both operands once while a wave's rows and columns stay
in L2 (groups of row tiles see to it), the output, the residual. From L2: T N K (1/rows + 1/columns) elements; 128 x 256
tiles ask 8 TB/s of it at 700 TFLOP/s, near what it has: bound by tensor cores, then L2, then HBM for T below ~200.
Operands come by TMA (one thread, no registers, zeros beyond the edges) into a ring of stages; wgmma reads them there
and accumulates in float32. The epilogue goes through the ring's own memory in column slices, because a TMA store would
keep a buffer of its own beside the ring, 64 KiB for 128 x 256: neither four stages nor a guest CTA would fit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.errors import ConfigError
from engine.kernels.gpu.dot import dot
from engine.kernels.gpu.gemm_config import GemmConfig, choose_config
from engine.kernels.gpu.narrowing import narrow

_TMA_BYTES = 16  # what addresses and row strides must be multiples of


@triton.jit
def tile_origin(
    tile: tl.tensor, num_row_tiles: tl.tensor, num_column_tiles: tl.tensor, GROUP: tl.constexpr
) -> tl.tensor:
    """Row and column tile: GROUP row tiles go through all columns together, row by row, so both fit into L2."""
    first = tile // (GROUP * num_column_tiles) * GROUP
    size = tl.minimum(num_row_tiles - first, GROUP)
    within = tile % (GROUP * num_column_tiles)
    return first + within % size, within // size


@triton.jit
def _store_slices(
    sums: tl.tensor,
    output: tl.tensor,
    residual: tl.tensor,
    bias: tl.tensor,
    row_scales: tl.tensor,
    column_scales: tl.tensor,
    first_row: tl.tensor,
    first_column: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    output_stride: tl.tensor,
    residual_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """The epilogue of a tile, half of its columns after the other until a slice has COLUMNS / PARTS of them."""
    if PARTS > 1:
        HALF: tl.constexpr = COLUMNS // 2
        # A warp group holds whole rows: the halves of a row are other registers of the same thread.
        low, high = tl.split(tl.permute(tl.reshape(sums, (ROWS, 2, HALF)), (0, 2, 1)))
        _store_slices(
            low, output, residual, bias, row_scales, column_scales, first_row, first_column, num_rows, num_columns,
            output_stride, residual_stride, ROWS, HALF, PARTS // 2,
        )  # fmt: skip
        _store_slices(
            high, output, residual, bias, row_scales, column_scales, first_row, first_column + HALF, num_rows,
            num_columns, output_stride, residual_stride, ROWS, HALF, PARTS // 2,
        )  # fmt: skip
    else:
        # Offsets within a tile are small; only where it begins may be beyond 2^31.
        row_offsets = tl.arange(0, ROWS)
        column_offsets = tl.arange(0, COLUMNS)
        rows = first_row + row_offsets
        columns = first_column + column_offsets
        inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        if row_scales is not None:
            sums *= tl.load(row_scales + rows, mask=rows < num_rows, other=0.0)[:, None]
        if column_scales is not None:
            sums *= tl.load(column_scales + columns, mask=columns < num_columns, other=0.0)[None, :]
        if bias is not None:
            sums += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
        if residual is not None:
            places = residual + first_row.to(tl.int64) * residual_stride + first_column
            offsets = row_offsets[:, None] * residual_stride + column_offsets[None, :]
            sums += tl.load(places + offsets, mask=inside, other=0.0).to(tl.float32)
        places = output + first_row.to(tl.int64) * output_stride + first_column
        offsets = row_offsets[:, None] * output_stride + column_offsets[None, :]
        tl.store(places + offsets, narrow(sums, output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["row_scales", "num_rows"])
def persistent_gemm(
    a: tl.tensor,
    b: tl.tensor,
    output: tl.tensor,
    residual: tl.tensor,
    bias: tl.tensor,
    row_scales: tl.tensor,
    column_scales: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    num_inner: tl.tensor,
    output_stride: tl.tensor,
    residual_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """`a` and `b` are descriptors of [T, K] and [N, K] in boxes [ROWS, INNER] and [COLUMNS, INNER].

    `residual`, `bias`, `row_scales` [T] and `column_scales` [N] may be None.
    """
    num_row_tiles = tl.cdiv(num_rows, ROWS)
    num_column_tiles = tl.cdiv(num_columns, COLUMNS)
    for tile in range(tl.program_id(0), num_row_tiles * num_column_tiles, tl.num_programs(0)):
        row_tile, column_tile = tile_origin(tile, num_row_tiles, num_column_tiles, GROUP)
        first_row = row_tile * ROWS
        first_column = column_tile * COLUMNS
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for inner in range(0, num_inner, INNER):
            a_tile = a.load([first_row, inner])
            b_tile = b.load([first_column, inner])
            sums = dot(a_tile, b_tile.T, sums)
        _store_slices(
            sums, output, residual, bias, row_scales, column_scales, first_row, first_column, num_rows, num_columns,
            output_stride, residual_stride, ROWS, COLUMNS, PARTS,
        )  # fmt: skip


def gemm(
    a_TK: Tensor,
    b_NK: Tensor,
    *,
    num_sms: int,
    residual_TN: Tensor | None = None,
    bias_N: Tensor | None = None,
    output: Tensor | None = None,
    config: GemmConfig | None = None,
) -> Tensor:
    """a b^T + bias + residual, rounded once: [T, N] in the type of `a`, or in that of `output` (which may be float32).

    `b_NK` is a weight as nn.Linear stores it. At most `num_sms` programs run. `output` may be `residual_TN` itself.
    bfloat16, float16 or float32 (whose products are not tensor cores' work: for tests). Raises ConfigError where an
    operand does not fit the others or TMA's alignment of 16 bytes.
    """
    if a_TK.dtype not in (torch.bfloat16, torch.float16, torch.float32) or b_NK.dtype != a_TK.dtype:
        raise ConfigError(
            f"gemm: operands are {a_TK.dtype} and {b_NK.dtype}; both must be bfloat16, float16 or float32 alike"
        )
    return launch_gemm(a_TK, b_NK, num_sms, residual_TN, bias_N, None, None, output, a_TK.dtype, config)


def launch_gemm(
    a_TK: Tensor,
    b_NK: Tensor,
    num_sms: int,
    residual_TN: Tensor | None,
    bias_N: Tensor | None,
    row_scales_T: Tensor | None,
    column_scales_N: Tensor | None,
    output: Tensor | None,
    output_dtype: torch.dtype,
    config: GemmConfig | None,
) -> Tensor:
    """What `gemm` and `scaled_gemm` share: checks of layout, the choice of a configuration, and the launch."""
    num_rows, num_inner = check_operand("a", a_TK)
    num_columns, inner_of_b = check_operand("b", b_NK)
    if inner_of_b != num_inner:
        raise ConfigError(f"gemm: a is [T, {num_inner}] but b is [N, {inner_of_b}]; the inner sizes must be equal")
    if num_inner < 1:
        raise ConfigError(f"gemm: a is [{num_rows}, 0] and b [{num_columns}, 0]; there must be something to multiply")
    if num_sms < 1:
        raise ConfigError(f"gemm: num_sms is {num_sms}; at least one program must run")
    if output is None:
        output = a_TK.new_empty((num_rows, num_columns), dtype=output_dtype)
    for name, matrix in (("output", output), ("residual", residual_TN)):
        if matrix is not None and (matrix.shape != (num_rows, num_columns) or matrix.stride(1) != 1):
            raise ConfigError(
                f"gemm: {name} is {list(matrix.shape)} with strides {matrix.stride()}; "
                f"it must be [{num_rows}, {num_columns}] with adjacent columns"
            )
    for name, vector, size in (("bias", bias_N, num_columns), ("scales of rows", row_scales_T, num_rows),
                               ("scales of columns", column_scales_N, num_columns)):  # fmt: skip
        if vector is not None and (vector.numel() != size or not vector.is_contiguous()):
            raise ConfigError(f"gemm: {name} are {list(vector.shape)}; they must be {size} adjacent numbers")
    if num_rows == 0 or num_columns == 0:
        return output
    element_bytes = a_TK.element_size()
    config = config or choose_config(num_rows, num_columns, num_inner, num_sms, element_bytes)
    inner = config.inner(element_bytes)
    persistent_gemm[(min(num_sms, config.num_tiles(num_rows, num_columns)),)](
        TensorDescriptor.from_tensor(a_TK, [config.rows, inner]),
        TensorDescriptor.from_tensor(b_NK, [config.columns, inner]),
        output, residual_TN, bias_N, row_scales_T, column_scales_N, num_rows, num_columns, num_inner,
        output.stride(0), 0 if residual_TN is None else residual_TN.stride(0),
        config.rows, config.columns, inner, config.group, config.epilogue_parts,
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.max_registers,
    )  # fmt: skip
    return output


def is_loadable(matrix: Tensor) -> bool:
    """Whether TMA can load it: a matrix of adjacent columns whose rows start at multiples of 16 bytes."""
    return (
        matrix.dim() == 2
        and (matrix.shape[1] <= 1 or matrix.stride(1) == 1)
        and matrix.stride(0) * matrix.element_size() % _TMA_BYTES == 0
        and matrix.data_ptr() % _TMA_BYTES == 0
    )


def check_operand(name: str, matrix: Tensor) -> tuple[int, int]:
    """The shape of a matrix that TMA can load. Raises ConfigError for any other."""
    if not is_loadable(matrix):
        raise ConfigError(
            f"gemm: {name} is {list(matrix.shape)} of {matrix.dtype} with strides {matrix.stride()}; TMA needs a "
            f"matrix of adjacent columns whose rows start at multiples of {_TMA_BYTES} bytes"
        )
    return matrix.shape[0], matrix.shape[1]
