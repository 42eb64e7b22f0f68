"""`ExecutionUnits`: the execution units (SMs) of a CUDA device, and how a share of them is granted to kernels.

A grant reaches kernels in two ways, both read when a kernel is launched, so that a captured graph keeps them. Our own
ask `UnitsAtHand`. Libraries read a setting of torch: products of matrices by cublasLt, torch's scaled and grouped ones,
and FlashAttention 3. Plain cuBLAS, NCCL and every other kernel do not, so whoever wants shares to count must have
called `torch.backends.cuda.preferred_blas_library("cublaslt")`. Nothing is reserved: the units that a kernel leaves are
free for whatever else is ready.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from engine.pipeline.schedule import ALL_UNITS
from engine.units_at_hand import UnitGrant, UnitsAtHand

# Hopper's units are handed out in clusters; a partition has a multiple of eight, and at least eight.
_GRANULE = 8


class ExecutionUnits:
    """`total` units. Shares are told in tenths, as in a `Step`."""

    def __init__(self, device: torch.device) -> None:
        self.total = int(torch.cuda.get_device_properties(device).multi_processor_count)

    def granted(self, tenths: int) -> int:
        """Units for a share. Up to half it is a multiple of eight; a larger one gets what the smaller one leaves.

        So two shares that make ten tenths never take more than all units, and lose few: 3 and 7 of 132 are 40 and 92.
        """
        if tenths == ALL_UNITS:
            return self.total
        smaller = min(tenths, ALL_UNITS - tenths)
        exact = smaller * self.total / ALL_UNITS / _GRANULE
        rounded = int(exact) if 2 * smaller == ALL_UNITS else int(exact + 0.5)
        units = min(max(1, rounded) * _GRANULE, self.total)
        return units if tenths == smaller else max(_GRANULE, self.total - units)

    def share(self, tenths: int) -> UnitGrant:
        """So many tenths of the units, wherever they are; all of them are apart from others, as there are none."""
        return UnitGrant(num_units=self.granted(tenths), is_apart=tenths == ALL_UNITS)

    @contextmanager
    def launching(self, grant: UnitGrant, at_hand: UnitsAtHand | None = None) -> Iterator[None]:
        """What is launched inside has this grant, kernels that ask `at_hand` included; afterwards all units again.

        The library's setting belongs to the process: only one thread may launch.
        """
        with nullcontext() if at_hand is None else at_hand.granted(grant):
            if grant.num_units == self.total:
                yield
                return
            torch._C._set_sm_carveout_experimental(self.total - grant.num_units)
            try:
                yield
            finally:
                torch._C._set_sm_carveout_experimental(None)
