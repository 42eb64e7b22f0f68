"""`ExecutionUnits`: the execution units (SMs) of a CUDA device, and how a share of them is granted to kernels.

The grant is a setting of torch that libraries read when a kernel is launched, so a captured graph keeps it. Who reads
it: products of matrices by cublasLt, torch's scaled and grouped ones, and FlashAttention 3. Plain cuBLAS, NCCL and
every other kernel do not, so whoever wants shares to count must have called
`torch.backends.cuda.preferred_blas_library("cublaslt")`. Nothing is reserved: the units that a kernel leaves are free
for whatever else is ready.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from engine.pipeline.schedule import ALL_UNITS

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

    def share(self, tenths: int) -> AbstractContextManager[None]:
        """What is launched inside gets so many tenths; afterwards everything gets all units again.

        The setting belongs to the process: only one thread may launch.
        """
        return nullcontext() if tenths == ALL_UNITS else _spared(self.total - self.granted(tenths))


@contextmanager
def _spared(num_units: int) -> Iterator[None]:
    torch._C._set_sm_carveout_experimental(num_units)
    try:
        yield
    finally:
        torch._C._set_sm_carveout_experimental(None)
