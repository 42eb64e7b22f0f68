"""`RankAgreement`: the ranks of a group measure the same thing and go on with the same numbers."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from engine.tensor_parallel import TensorParallel


class RankAgreement:
    """Every method is a collective that all ranks call together; in a group of one nothing happens."""

    def __init__(self, tensor_parallel: TensorParallel, device: torch.device) -> None:
        self._tensor_parallel = tensor_parallel
        self._device = device

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that reads and writes files."""
        return self._tensor_parallel.rank == 0

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """Of each number the largest of all ranks."""
        return self._reduced(numbers, dist.ReduceOp.MAX)

    def smallest(self, numbers: Sequence[float]) -> list[float]:
        """Of each number the smallest of all ranks."""
        return self._reduced(numbers, dist.ReduceOp.MIN)

    def text_of_first(self, text: str) -> str:
        """What rank 0 has; what the others give does not matter."""
        if self._tensor_parallel.size == 1:
            return text
        shared = [text]
        dist.broadcast_object_list(shared, group=self._tensor_parallel.group, group_src=0)
        return shared[0]

    def meet(self) -> None:
        """Wait until every rank is here."""
        self._reduced([0.0], dist.ReduceOp.MAX)

    def _reduced(self, numbers: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self._tensor_parallel.size == 1:
            return list(numbers)
        agreed = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        dist.all_reduce(agreed, op=operation, group=self._tensor_parallel.group)
        return [float(number) for number in agreed.tolist()]
