"""`RowLaunch`: how a kernel that holds whole rows in registers is launched; and what its arguments must be.

A program takes a row, and then the row as many further on as there are programs. Without a limit there is one for
every row: the device's scheduler balances them, and enough are resident to keep the memory busy. With `num_ctas` the
kernel leaves the other multiprocessors to whatever runs beside it; programs are few then, so each loads rows ahead,
through shared memory, to have under way what its multiprocessor can take: 4 TB/s for some 0.8 us are 25 KiB for each
of 132, more where there are fewer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import ConfigError

LARGEST_WIDTH = 65536
# Elements of a row for one thread: two loads of 16 bytes in flight from each input of two-byte elements.
_ELEMENTS_PER_THREAD = 16
_MAX_WARPS = 16
_MAX_STAGES = 3
# Room for what is loaded ahead: beside a GEMM's tiles in shared memory there may be no more.
_AHEAD_BYTES = 49152


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLaunch:
    """`block` is the next power of two of a row's width; `num_programs` is 0 where there is nothing to do."""

    num_programs: int
    block: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, num_rows: int, width: int, num_ctas: int | None, column_bytes: int) -> "RowLaunch":
        """A pure function of sizes; `column_bytes` are those that are read for a column of one row.

        Raises ConfigError for a row that no program could hold, or for no program at all.
        """
        if not 0 < width <= LARGEST_WIDTH:
            raise ConfigError(f"A row of {width} elements does not fit a program: 1..{LARGEST_WIDTH} would.")
        block = 1 << (width - 1).bit_length()
        num_warps = min(_MAX_WARPS, max(1, block // (32 * _ELEMENTS_PER_THREAD)))
        num_programs = limited(num_rows, num_ctas)
        num_stages = stages_of(num_rows, num_programs, block * column_bytes)
        return cls(num_programs=num_programs, block=block, num_warps=num_warps, num_stages=num_stages)


def limited(num_items: int, num_ctas: int | None) -> int:
    """One program for each item, or as many as allowed."""
    if num_ctas is not None and num_ctas < 1:
        raise ConfigError(f"num_ctas is {num_ctas}, but a kernel needs at least 1 (None for no limit).")
    return num_items if num_ctas is None else min(num_items, num_ctas)


def stages_of(num_items: int, num_programs: int, item_bytes: int) -> int:
    """One, and one for every item that a program loads ahead: none where it takes only one, or items are large."""
    if num_programs == num_items:
        return 1
    return min(_MAX_STAGES, 1 + _AHEAD_BYTES // item_bytes)


def check_argument(name: str, given: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Raise ConfigError unless `given` is contiguous, of this shape and of one of these dtypes (if any are named)."""
    if tuple(given.shape) != shape:
        raise ConfigError(f"{name} has shape {tuple(given.shape)}, where {shape} is right.")
    if dtypes and given.dtype not in dtypes:
        raise ConfigError(f"{name} is {given.dtype}, where {' or '.join(map(str, dtypes))} is right.")
    if not given.is_contiguous():
        raise ConfigError(f"{name} has strides {given.stride()}: a contiguous tensor is right.")


def check_floating(name: str, given: Tensor, num_dimensions: int) -> None:
    """Raise ConfigError unless `given` is a contiguous bfloat16, float16 or float32 tensor of so many dimensions."""
    if given.dim() != num_dimensions:
        raise ConfigError(f"{name} has shape {tuple(given.shape)}, where {num_dimensions} dimensions are right.")
    check_argument(name, given, tuple(given.shape), torch.bfloat16, torch.float16, torch.float32)
