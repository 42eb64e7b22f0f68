"""Adds the partial results of tensor-parallel ranks that live in one process: an all-reduce without a network.

The sum is in float32, in the order of the ranks, and rounded once, so every rank would get the same bits; a residual is
added to that rounded sum, as a layer does. With a limit on its programs it stands for a network operation in studies of
overlap: what is timed is then an emulation.

Bound: memory. Llama-3-8B, 2,048 tokens of 4,096 bfloat16 elements, two ranks: 50.3 MB, 12.6 us at 4 TB/s (with a
residual 67.1 MB, 16.8 us). Tiles of 4,096 elements, 16 a thread in two loads of 16 bytes from every rank. One
multiprocessor moves about 50 GB/s, so 16 programs would take some 60 us: about what 450 GB/s of NVLink would.

Legend: T tokens, E hidden.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.gpu.narrowing import narrow
from engine.kernels.gpu.row_launch import check_argument, check_floating, limited, stages_of

MAX_RANKS = 8
_TILE = 4096
_WARPS = 8


def add_partials(
    partials: Sequence[Tensor],
    output_TE: Tensor | None = None,
    *,
    residual_TE: Tensor | None = None,
    num_ctas: int | None = None,
) -> Tensor:
    """The sum of 1..8 tensors [T, E], plus the residual if there is one; the output may be one of the inputs.

    The partial results may be slices of wider rows, all of the same width: ranks side by side.
    """
    if not 1 <= len(partials) <= MAX_RANKS:
        raise ConfigError(f"{len(partials)} partial results were given: 1..{MAX_RANKS} can be added.")
    first_TE = partials[0]
    shape, dtype = tuple(first_TE.shape), first_TE.dtype
    gap = _gap(first_TE)
    check_floating("partials[0]", first_TE[:0] if gap else first_TE, 2)
    for rank, partial_TE in enumerate(partials):
        if gap and partial_TE.shape == shape and partial_TE.dtype == dtype and _gap(partial_TE) == gap:
            continue
        check_argument(f"partials[{rank}]", partial_TE, shape, dtype)
    if residual_TE is not None:
        check_argument("residual_TE", residual_TE, shape, dtype)
    if output_TE is None:
        output_TE = first_TE.new_empty(shape)
    check_argument("output_TE", output_TE, shape, dtype)
    size = first_TE.numel()
    num_inputs = len(partials) + (residual_TE is not None)
    num_tiles = -(-size // _TILE)
    num_programs = limited(num_tiles, num_ctas)
    if num_programs:
        add_partials_kernel[(num_programs,)](
            *partials,
            *[first_TE] * (MAX_RANKS - len(partials)),  # never looked at
            first_TE if residual_TE is None else residual_TE,
            output_TE,
            size,
            gap,
            WIDTH=shape[1] if gap else 0,
            NUM_RANKS=len(partials),
            HAS_RESIDUAL=residual_TE is not None,
            BLOCK=_TILE,
            STAGES=stages_of(num_tiles, num_programs, num_inputs * _TILE * first_TE.itemsize),
            num_warps=_WARPS,
        )
    return output_TE


def _gap(partial_TE: Tensor) -> int:
    """Elements of other ranks between two rows of this one's."""
    num_rows, width = partial_TE.shape if partial_TE.dim() == 2 else (0, 0)
    if num_rows == 0 or width == 0 or partial_TE.is_contiguous() or partial_TE.stride(1) != 1:
        return 0
    return max(0, partial_TE.stride(0) - width)


@triton.jit
def add_partials_kernel(
    partial_0: tl.tensor,
    partial_1: tl.tensor,
    partial_2: tl.tensor,
    partial_3: tl.tensor,
    partial_4: tl.tensor,
    partial_5: tl.tensor,
    partial_6: tl.tensor,
    partial_7: tl.tensor,
    residual: tl.tensor,
    output: tl.tensor,
    size: tl.tensor,
    gap: tl.tensor,
    WIDTH: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """One tile after the other."""
    dtype = output.dtype.element_ty
    for tile in tl.range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0), num_stages=STAGES):
        places = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < size
        sources = places
        if WIDTH:
            sources += (places // WIDTH) * gap
        total = tl.load(partial_0 + sources, mask=inside, other=0.0).to(tl.float32)
        if NUM_RANKS > 1:
            total += tl.load(partial_1 + sources, mask=inside, other=0.0).to(tl.float32)
        if NUM_RANKS > 2:
            total += tl.load(partial_2 + sources, mask=inside, other=0.0).to(tl.float32)
        if NUM_RANKS > 3:
            total += tl.load(partial_3 + sources, mask=inside, other=0.0).to(tl.float32)
        if NUM_RANKS > 4:
            total += tl.load(partial_4 + sources, mask=inside, other=0.0).to(tl.float32)
        if NUM_RANKS > 5:
            total += tl.load(partial_5 + sources, mask=inside, other=0.0).to(tl.float32)
        if NUM_RANKS > 6:
            total += tl.load(partial_6 + sources, mask=inside, other=0.0).to(tl.float32)
        if NUM_RANKS > 7:
            total += tl.load(partial_7 + sources, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            rounded = narrow(total, dtype).to(tl.float32)
            total = rounded + tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(output + places, narrow(total, dtype), mask=inside)
