"""`SymmetricSums`: all-reduces of small messages through symmetric memory: buffers that every GPU of a group can read.

A sum of a few rows is bound by latency, and NCCL's is several times that of one kernel that reads every rank's values
("one shot"), or sums a part and fetches the others' parts ("two shots"); where the links can add up themselves (NVLink
with NVLS), that is one read for all ranks. All wait on the device only, so they can be captured; torch has them
(torch.distributed._symmetric_memory). All ranks decide alike: by bytes, dtype, and what was agreed on when they met.
"""

import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.pipeline.rank_agreement import RankAgreement
from engine.tensor_parallel import TensorParallel

# Up to here every rank reads everything: (N - 1) n bytes in one latency, rather than 2 (N - 1) / N n in two.
_ONE_SHOT_BYTES = 2**18
# Kernels read and write 16 bytes at a time, of a part for every rank.
_GRANULE = 16
_DTYPES = (torch.bfloat16, torch.float32)
_SMALLEST_MEASURED = 2**13
_NUM_ROUNDS, _SUMS_PER_ROUND = 5, 20


def unsupported(dtype: torch.dtype) -> str | None:
    """Why activations of this dtype cannot be summed so; None where they can."""
    if dtype in _DTYPES:
        return None
    return f"symmetric memory sums {' and '.join(map(_name, _DTYPES))}, not {_name(dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class SymmetricSums:
    """One buffer of a rank, known to the others once they `meet`. `limit`: bytes of the largest message."""

    def __init__(self, buffer: Tensor, num_ranks: int) -> None:
        self._buffer = buffer
        self._num_ranks = num_ranks
        self._granule = _GRANULE * num_ranks
        self._group_name = ""
        self.has_multicast = False
        self.limit = buffer.nbytes

    @classmethod
    def allocate(cls, dtype: torch.dtype, device: torch.device, num_bytes: int, num_ranks: int) -> "SymmetricSums":
        """A buffer for messages of up to so many bytes; raises what torch does where there can be none."""
        import torch.distributed._symmetric_memory as symmetric_memory

        if torch.cuda.device_count() == 1 < num_ranks:
            # Every rank is shown a GPU of its own, which all call 0: torch takes that for one device shared by all.
            os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        granule = _GRANULE * num_ranks
        num_elements = -(-num_bytes // granule) * granule // dtype.itemsize
        return cls(symmetric_memory.empty(num_elements, dtype=dtype, device=device), num_ranks)

    @property
    def granule(self) -> int:
        """Bytes that messages are multiples of."""
        return self._granule

    def meet(self, group: Any) -> None:
        """Exchange addresses with all ranks of the group, together; raises what torch does where they see no other."""
        import torch.distributed._symmetric_memory as symmetric_memory

        handle = symmetric_memory.rendezvous(self._buffer, group.group_name)
        if handle is None:
            raise RuntimeError("torch gave this buffer no handle")
        self.has_multicast = bool(handle.multicast_ptr)
        self._group_name = group.group_name

    def try_out(self) -> None:
        """Sum ones, few and many, by all ranks together; raises what torch does, and RuntimeError for a wrong sum."""
        for num_bytes in (self._granule, self.limit):
            ones = torch.ones_like(self._buffer[: num_bytes // self._buffer.itemsize])
            self.all_reduce(ones)
            if not bool((ones == self._num_ranks).all()):
                raise RuntimeError(f"ones of {self._num_ranks} ranks add up to {float(ones.float().mean()):g}")

    def agree_on_multicast(self, is_everywhere: bool) -> None:
        """Links add up only where they do so for every rank."""
        self.has_multicast = is_everywhere

    def takes(self, partial: Tensor) -> bool:
        """See `engine.tensor_parallel.SmallSums`."""
        return (
            0 < partial.nbytes <= self.limit
            and partial.nbytes % self._granule == 0
            and partial.dtype is self._buffer.dtype
            and partial.is_contiguous()
        )

    def all_reduce(self, partial: Tensor) -> None:
        """See `engine.tensor_parallel.SmallSums`. Ends when no rank reads this one's buffer any more."""
        operations: Any = torch.ops.symm_mem
        values = partial.view(-1)
        shared = self._buffer[: values.numel()]
        shared.copy_(values)
        is_short = partial.nbytes <= _ONE_SHOT_BYTES
        if self.has_multicast and is_short:
            operations.multimem_one_shot_all_reduce_out(shared, "sum", self._group_name, values)
        elif self.has_multicast:
            operations.multimem_all_reduce_(shared, "sum", self._group_name)
            values.copy_(shared)
        elif is_short:
            operations.one_shot_all_reduce_out(shared, "sum", self._group_name, values)
        else:
            operations.two_shot_all_reduce_out(shared, "sum", self._group_name, values)


def fastest_below(sums: SymmetricSums, plain: TensorParallel, agreement: RankAgreement, device: torch.device) -> int:
    """Bytes up to which the sums beat those of `plain`, measured by all ranks together, on the slowest of them."""
    buffer = torch.zeros(sums.limit, dtype=torch.uint8, device=device).view(sums._buffer.dtype)
    sizes = []
    size = _SMALLEST_MEASURED
    while size <= sums.limit:
        sizes.append(size - size % sums.granule)
        size *= 2

    def timed(num_bytes: int, run: Callable[[Tensor], object]) -> float:
        message = buffer[: num_bytes // buffer.itemsize]
        return _seconds(lambda: run(message))

    ours = agreement.largest([timed(size, sums.all_reduce) for size in sizes])
    theirs = agreement.largest([timed(size, lambda part: dist.all_reduce(part, group=plain.group)) for size in sizes])
    return last_won(sizes, ours, theirs)


def last_won(sizes: Sequence[int], ours: Sequence[float], theirs: Sequence[float]) -> int:
    """The last size before the first at which ours take no less time than theirs; 0 where that is the first of all."""
    won = 0
    for size, own, other in zip(sizes, ours, theirs, strict=True):
        if own >= other:
            break
        won = size
    return won


def _seconds(run: Callable[[], object]) -> float:
    """Of one of many sums on the device, one after the other: the median of a few rounds."""
    rounds: list[float] = []
    for number in range(_NUM_ROUNDS + 1):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begun.record()
        for _ in range(_SUMS_PER_ROUND):
            run()
        ended.record()
        ended.synchronize()
        if number:  # the first warms up
            rounds.append(begun.elapsed_time(ended) / 1e3 / _SUMS_PER_ROUND)
    return statistics.median(rounds)
