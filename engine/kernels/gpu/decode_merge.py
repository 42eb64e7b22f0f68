"""Joins the parts of contexts that shares of decode attention cut in two.

Program c looks at the sequence that its share ends in. If it began there and goes on, its parts are the second of c and
the first of every program up to the one that it ends in; they are joined in that order. A few KiB per program, about
two microseconds; its grid is (programs, heads of a group), however many sequences were cut. Sequences without a token,
which are in no share, get their zeros here.
"""

# mypy: disable-error-code="misc"

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu.decode_plan import DecodeScratch, program_of, share_of

# Parts joined at once.
_PARTS = 16


def merge_parts(
    scratch: DecodeScratch, output_DHd: Tensor, *, num_kv_heads: int, num_ctas: int, value_scale: float
) -> None:
    """Write the rows of `output_DHd` whose parts are in `scratch`, after `num_ctas` programs have left them there, and
    those of empty sequences.
    """
    num_heads, head_dim = output_DHd.shape[1:]
    group_size = num_heads // num_kv_heads
    _merge[(num_ctas, group_size)](
        scratch.num_tiles,
        scratch.tiles,
        scratch.is_empty,
        scratch.partial_sums,
        scratch.partial_weights,
        output_DHd,
        value_scale,
        len(output_DHd),
        output_DHd.stride(0),
        scratch.tiles.shape[1],
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group_size,
        HEAD_DIM=head_dim,
        WIDTH=triton.next_power_of_2(head_dim),
        PARTS=_PARTS,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["value_scale", "num_rows", "capacity"])
def _merge(
    num_planned: tl.tensor,
    tiles: tl.tensor,
    is_empty: tl.tensor,
    partial_sums: tl.tensor,
    partial_weights: tl.tensor,
    output: tl.tensor,
    value_scale: tl.tensor,
    num_rows: tl.tensor,
    output_stride: tl.tensor,
    capacity: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """One query head of the group whose context the program's share ends in, and of every empty sequence that falls to
    the program.
    """
    program = tl.program_id(0)
    member = tl.program_id(1)
    for empty_row in range(program, num_rows, tl.num_programs(0)):
        if tl.load(is_empty + empty_row) != 0:
            _clear(output + tl.cast(empty_row, tl.int64) * output_stride, member, NUM_KV_HEADS, GROUP, HEAD_DIM, WIDTH)
    num_tiles = tl.load(num_planned)
    total = num_tiles * NUM_KV_HEADS
    first, last = share_of(program, tl.num_programs(0), total)
    if last > first:
        head = (last - 1) // num_tiles
        tile = (last - 1) % num_tiles
        row = tl.load(tiles + tile)
        done = tl.load(tiles + 2 * capacity + tile)
        left = tl.load(tiles + 3 * capacity + tile)
        if (left > 0) & (last - 1 - done >= first):
            num_parts = program_of(last - 1 + left, tl.num_programs(0), total) - program + 1
            dims_d = tl.arange(0, WIDTH)
            largest = -1.0e30
            for start in range(0, num_parts, PARTS):
                weights_P, is_part_P = _weights(partial_weights, program, member, start, num_parts, GROUP, PARTS)
                scores_P = tl.load(weights_P, mask=is_part_P, other=-1.0e30)
                largest = tl.maximum(largest, tl.max(scores_P, 0))
            sum_d = tl.zeros((WIDTH,), tl.float32)
            weight = 0.0
            for start in range(0, num_parts, PARTS):
                weights_P, is_part_P = _weights(partial_weights, program, member, start, num_parts, GROUP, PARTS)
                factor_P = tl.exp2(tl.load(weights_P, mask=is_part_P, other=-1.0e30) - largest)
                weight += tl.sum(factor_P * tl.load(weights_P + GROUP, mask=is_part_P, other=0.0), 0)
                number_P = start + tl.arange(0, PARTS)
                part_P = (program + number_P) * 2 + (number_P == 0).to(tl.int32)
                upper_Pd = partial_sums + (part_P[:, None] * 2 * GROUP + member) * WIDTH + dims_d[None, :]
                high_Pd = tl.load(upper_Pd, mask=is_part_P[:, None], other=0).to(tl.int32)
                low_Pd = tl.load(upper_Pd + GROUP * WIDTH, mask=is_part_P[:, None], other=0).to(tl.int32)
                sums_Pd = ((high_Pd << 16) | (low_Pd & 0xFFFF)).to(tl.float32, bitcast=True)
                sum_d += tl.sum(factor_P[:, None] * sums_Pd, 0)
            tl.store(
                output + row.to(tl.int64) * output_stride + (head * GROUP + member) * HEAD_DIM + dims_d,
                (sum_d * (value_scale / tl.maximum(weight, 1.0e-30))).to(output.dtype.element_ty),
                mask=dims_d < HEAD_DIM,
            )


@triton.jit
def _clear(
    row: tl.tensor,
    member: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Zeros for one query head of every group."""
    dims_d = tl.arange(0, WIDTH)
    for head in range(NUM_KV_HEADS):
        zeros_d = tl.zeros((WIDTH,), row.dtype.element_ty)
        tl.store(row + (head * GROUP + member) * HEAD_DIM + dims_d, zeros_d, mask=dims_d < HEAD_DIM)


@triton.jit
def _weights(
    partial_weights: tl.tensor,
    program: tl.tensor,
    member: tl.tensor,
    start: tl.tensor,
    num_parts: tl.tensor,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Where the largest scores of some parts are, and which of them exist; a sum of weights is GROUP further on."""
    number_P = start + tl.arange(0, PARTS)
    part_P = (program + number_P) * 2 + (number_P == 0).to(tl.int32)
    return partial_weights + part_P * 2 * GROUP + member, number_P < num_parts
