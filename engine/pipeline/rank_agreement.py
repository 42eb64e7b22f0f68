"""`RankAgreement`: the ranks of a group measure the same thing and go on with the same numbers."""

import logging
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from engine.errors import NanoserveError
from engine.tensor_parallel import TensorParallel

_log = logging.getLogger(__name__)


class FirstRankError(NanoserveError):
    """What rank 0 does alone failed; raised on every rank, so that none waits for it."""


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
        return self._of_first((True, text))[1]

    def done_by_first(self, work: Callable[[], str]) -> str:
        """What `work` returns on rank 0, which alone does it; raises `FirstRankError` everywhere if it fails there."""
        outcome = True, ""
        if self.is_first:
            try:
                outcome = True, work()
            except Exception as error:  # whatever it is, the other ranks wait
                outcome = False, _described(error)
        succeeded, text = self._of_first(outcome)
        if not succeeded:
            raise FirstRankError(text)
        return text

    def meet(self) -> None:
        """Wait until every rank is here."""
        self._reduced([0.0], dist.ReduceOp.MAX)

    def _of_first(self, outcome: tuple[bool, str]) -> tuple[bool, str]:
        if self._tensor_parallel.size == 1:
            return outcome
        shared = [outcome]
        dist.broadcast_object_list(shared, group=self._tensor_parallel.group, group_src=0)
        return shared[0]

    def _reduced(self, numbers: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self._tensor_parallel.size == 1:
            return list(numbers)
        agreed = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        dist.all_reduce(agreed, op=operation, group=self._tensor_parallel.group)
        return [float(number) for number in agreed.tolist()]


def _described(error: Exception) -> str:
    """The error in a line; one that was not raised on purpose is logged with where it came from."""
    if isinstance(error, NanoserveError):
        return str(error)
    _log.warning("Rank 0 failed in what it does for the group.", exc_info=error)
    return f"{type(error).__name__}: {error}"
