"""A persistent grouped GEMM: every expert's weight times the tokens routed to it, in one launch with a constant grid.

Legend: T tokens, k experts per token, S = T k copies sorted by expert, X experts, N outputs, K inner of one expert.
Programs read on the device where each expert's copies begin, and so which tile is whose: one CUDA graph serves every
routing, experts without tokens have no tiles. Two forms, of a gated feed-forward:
`gated_gemm` reads token rows through the order of the copies and gives silu(gate) * up at sorted places: the 2 F wide
product is never written. `scattered_gemm` reads sorted rows and writes each result at its copy, token by token, so that
the sum over a token's copies needs no atomics.

2 S N K flops. Bound by the tensor cores from about 200 copies per expert on, below by the weights of the experts met
(Mixtral: 352 MB a layer, 88 us at 4 TB/s). Weights and sorted rows come by TMA; token rows cannot on Hopper, so they
come by cp.async, 16 bytes a thread. Tiles of an expert are neighbours and share its weights in L2.
"""

# mypy: disable-error-code="misc"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.errors import ConfigError
from engine.kernels.gpu.dot import dot
from engine.kernels.gpu.expert_routing import ExpertRouting
from engine.kernels.gpu.gemm import check_operand, tile_origin
from engine.kernels.gpu.gemm_config import GemmConfig
from engine.kernels.gpu.grouped_gemm_config import choose_grouped_config
from engine.kernels.gpu.narrowing import narrow


@triton.jit
def _store_copies(
    sums: tl.tensor,
    ups: tl.tensor,
    output: tl.tensor,
    order: tl.tensor,
    first_place: tl.tensor,
    end_place: tl.tensor,
    first_column: tl.tensor,
    num_columns: tl.tensor,
    output_stride: tl.tensor,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Column slices as in gemm.py; gate and up are rounded, activated and multiplied as the layer's operations are."""
    if PARTS > 1:
        HALF: tl.constexpr = COLUMNS // 2
        low, high = tl.split(tl.permute(tl.reshape(sums, (ROWS, 2, HALF)), (0, 2, 1)))
        low_ups, high_ups = low, high
        if GATED:
            low_ups, high_ups = tl.split(tl.permute(tl.reshape(ups, (ROWS, 2, HALF)), (0, 2, 1)))
        _store_copies(
            low, low_ups, output, order, first_place, end_place, first_column, num_columns, output_stride,
            GATED, ROWS, HALF, PARTS // 2,
        )  # fmt: skip
        _store_copies(
            high, high_ups, output, order, first_place, end_place, first_column + HALF, num_columns, output_stride,
            GATED, ROWS, HALF, PARTS // 2,
        )  # fmt: skip
    else:
        dtype: tl.constexpr = output.dtype.element_ty
        places = first_place + tl.arange(0, ROWS)
        columns = first_column + tl.arange(0, COLUMNS)
        inside = (places < end_place)[:, None] & (columns < num_columns)[None, :]
        if GATED:
            gates = narrow(sums, dtype).to(tl.float32)
            activated = narrow(gates / (1.0 + tl.exp(-gates)), dtype).to(tl.float32)
            sums = activated * narrow(ups, dtype).to(tl.float32)
            rows = places
        else:
            rows = tl.load(order + places, mask=places < end_place, other=0)
        tl.store(
            output + rows.to(tl.int64)[:, None] * output_stride + columns[None, :], narrow(sums, dtype), mask=inside
        )


@triton.jit
def grouped_gemm_kernel(
    a: tl.tensor,
    b: tl.tensor,
    output: tl.tensor,
    order: tl.tensor,
    starts: tl.tensor,
    num_columns: tl.tensor,
    num_inner: tl.tensor,
    a_stride: tl.tensor,
    output_stride: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    NUM_CHOICES: tl.constexpr,
    GATED: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """`a`: GATED, a pointer to [T, K]; else a descriptor of [S, K]. `b`: a descriptor of all experts' rows below one
    another, [X N, K], or [X 2 N, K] with the N gates of an expert before its N ups.
    """
    experts_X = tl.arange(0, EXPERTS)
    starts_X = tl.load(starts + experts_X, mask=experts_X < NUM_EXPERTS, other=0)
    ends_X = tl.load(starts + experts_X + 1, mask=experts_X < NUM_EXPERTS, other=0)
    tiles_X = tl.cdiv(ends_X - starts_X, ROWS)
    tile_ends_X = tl.cumsum(tiles_X, axis=0)
    num_row_tiles = tl.sum(tiles_X, axis=0)
    num_column_tiles = tl.cdiv(num_columns, COLUMNS)
    for tile in range(tl.program_id(0), num_row_tiles * num_column_tiles, tl.num_programs(0)):
        row_tile, column_tile = tile_origin(tile, num_row_tiles, num_column_tiles, GROUP)
        expert = tl.sum((tile_ends_X <= row_tile).to(tl.int32), axis=0)
        first_tile = tl.sum(tl.where(experts_X == expert, tile_ends_X - tiles_X, 0), axis=0)
        first_place = tl.load(starts + expert) + (row_tile - first_tile) * ROWS
        end_place = tl.load(starts + expert + 1)
        first_column = column_tile * COLUMNS
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        if GATED:
            ups = tl.zeros((ROWS, COLUMNS), tl.float32)
            places = first_place + tl.arange(0, ROWS)
            inside = (places < end_place)[:, None]
            tokens = tl.load(order + places, mask=places < end_place, other=0) // NUM_CHOICES
            inner_offsets = tl.arange(0, INNER)
            rows = a + tokens.to(tl.int64)[:, None] * a_stride + inner_offsets[None, :]
            first_row = expert * 2 * num_columns + first_column
            for inner in range(0, num_inner, INNER):
                mask = inside & (inner_offsets < num_inner - inner)[None, :]
                a_tile = tl.load(rows + inner, mask=mask, other=0.0)
                sums = dot(a_tile, b.load([first_row, inner]).T, sums)
                ups = dot(a_tile, b.load([first_row + num_columns, inner]).T, ups)
        else:
            ups = sums
            first_row = expert * num_columns + first_column
            for inner in range(0, num_inner, INNER):
                sums = dot(a.load([first_place, inner]), b.load([first_row, inner]).T, sums)
        _store_copies(
            sums, ups, output, order, first_place, end_place, first_column, num_columns, output_stride,
            GATED, ROWS, COLUMNS, PARTS,
        )  # fmt: skip


def gated_gemm(
    hidden_TE: Tensor,
    gate_up_XOE: Tensor,
    routing: ExpertRouting,
    *,
    num_sms: int,
    output: Tensor | None = None,
    config: GemmConfig | None = None,
) -> Tensor:
    """silu(gate) * up of every copy at its sorted place: [T, E], [X, 2 F, E] -> [S, F].

    Rows of places that no copy has stay as they were. Raises ConfigError where operands do not fit one another.
    """
    num_columns = gate_up_XOE.shape[1] // 2
    return _launch(hidden_TE, gate_up_XOE, routing, num_columns, True, num_sms, output, config)


def scattered_gemm(
    sorted_SF: Tensor,
    down_XEF: Tensor,
    routing: ExpertRouting,
    *,
    num_sms: int,
    output: Tensor | None = None,
    config: GemmConfig | None = None,
) -> Tensor:
    """The product of every copy, in the order of the copies (token by token): [S, F], [X, E, F] -> [S, E].

    Rows of copies that have no place (padded tokens) stay as they were. Raises ConfigError as `gated_gemm` does.
    """
    return _launch(sorted_SF, down_XEF, routing, down_XEF.shape[1], False, num_sms, output, config)


def _launch(
    a: Tensor,
    weight: Tensor,
    routing: ExpertRouting,
    num_columns: int,
    is_gated: bool,
    num_sms: int,
    output: Tensor | None,
    config: GemmConfig | None,
) -> Tensor:
    num_copies = routing.order.numel()
    num_rows = num_copies // routing.num_experts_per_token if is_gated else num_copies
    if weight.dim() != 3 or not weight.is_contiguous() or weight.shape[0] != routing.num_experts:
        raise ConfigError(
            f"grouped GEMM: weights are {list(weight.shape)} with strides {weight.stride()}; "
            f"they must be dense, [{routing.num_experts}, outputs, inner]"
        )
    if a.dtype != weight.dtype or a.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ConfigError(
            f"grouped GEMM: {a.dtype} times {weight.dtype}; both must be bfloat16, float16 or float32 alike"
        )
    num_inner = weight.shape[2]
    flat = weight.view(-1, num_inner)
    check_operand("the weight", flat)
    if check_operand("the input", a) != (num_rows, num_inner):
        raise ConfigError(f"grouped GEMM: the input is {list(a.shape)}; it must be [{num_rows}, {num_inner}]")
    if num_sms < 1:
        raise ConfigError(f"grouped GEMM: num_sms is {num_sms}; at least one program must run")
    if output is None:
        # Rows without a copy are multiplied with the others of their tile and not stored: no matter what they hold,
        # but for the interpreter, which warns of numbers that are none.
        output = (a.new_empty if a.is_cuda else a.new_zeros)((num_copies, num_columns))
    if output.shape != (num_copies, num_columns) or output.stride(1) != 1 or output.dtype != a.dtype:
        raise ConfigError(
            f"grouped GEMM: the output is {list(output.shape)} of {output.dtype} with strides {output.stride()}; "
            f"it must be [{num_copies}, {num_columns}] of {a.dtype} with adjacent columns"
        )
    if num_copies == 0:
        return output
    element_bytes = a.element_size()
    config = config or choose_grouped_config(
        num_copies, routing.num_experts, num_columns, num_inner, num_sms, is_gated, element_bytes
    )
    inner = config.inner(element_bytes)
    grouped_gemm_kernel[(num_sms,)](
        a if is_gated else TensorDescriptor.from_tensor(a, [config.rows, inner]),
        TensorDescriptor.from_tensor(flat, [config.columns, inner]),
        output, routing.order, routing.starts, num_columns, num_inner, a.stride(0), output.stride(0),
        routing.num_experts, routing.num_experts_per_token, is_gated,
        max(16, triton.next_power_of_2(routing.num_experts)),
        config.rows, config.columns, inner, config.group, config.epilogue_parts,
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.max_registers,
    )  # fmt: skip
    return output
