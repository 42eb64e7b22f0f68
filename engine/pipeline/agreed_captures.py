"""`AgreedCaptures`: the ranks of a group have the same graphs, or none of them has one.

A rank whose run cannot be captured, or that has no memory for the graph, would go on with steps of other sizes than
the ranks that have it: collectives of different sizes would meet. So every rank first tries by itself, with its
collectives silent, because what breaks off in the middle leaves the others waiting; then all ask each other.
"""

from collections.abc import Callable

import torch

from engine.errors import first_line
from engine.pipeline.capture import CapturedRun, CaptureError, CaptureMemoryError, Captures, Result
from engine.pipeline.rank_agreement import RankAgreement
from engine.tensor_parallel import TensorParallel

# How an attempt ended, the worst first: the ranks go by the smallest.
_FAILED, _REFUSED, _NO_MEMORY, _DONE = range(4)


class AgreedCaptures(Captures):
    """As `Captures`; every method is called by all ranks together. A group of one agrees with itself."""

    def __init__(self, device: torch.device, tensor_parallel: TensorParallel) -> None:
        super().__init__(device)
        self._tensor_parallel = tensor_parallel
        self._agreement = RankAgreement(tensor_parallel, device)

    def capture(self, run: Callable[[], Result]) -> CapturedRun[Result]:
        """See `Captures.capture`. In a group `run` is called once more, between rehearsal and recording, so that the
        network connects what it needs for this: a recording is no place for it.

        Raises `CaptureError` on every rank where one of them cannot, `CaptureMemoryError` where all that a rank lacks
        is memory.
        """
        with self._tensor_parallel.silent():
            self._together(lambda: self.rehearse(run))
        if self._tensor_parallel.size > 1:
            run()
        return self._together(lambda: self.record(run))

    def _together(self, attempt: Callable[[], Result]) -> Result:
        """What `attempt`, which exchanges nothing, returns on this rank, if it does so on every one."""
        ending, result = _DONE, None
        error: CaptureError | None = None
        try:
            result = attempt()
        except CaptureError as failure:
            ending, error = _REFUSED, failure
        except Exception as failure:
            lack = _out_of_memory(failure)
            if lack is None:  # whatever it is, the other ranks wait
                self._agreement.smallest([_FAILED])
                raise
            ending, error = _NO_MEMORY, CaptureMemoryError(f"No memory for a CUDA graph: {first_line(lack)}")
            error.__cause__ = failure
        (worst,) = self._agreement.smallest([ending])
        if worst == _NO_MEMORY:
            raise error or CaptureMemoryError("Another rank of the group has no memory for this CUDA graph.")
        if worst != _DONE:
            raise (
                error
                if ending == worst and error is not None
                else CaptureError("Another rank of the group cannot make this a CUDA graph; its own log says more.")
            )
        return result  # type: ignore[return-value]


def _out_of_memory(error: BaseException | None) -> torch.OutOfMemoryError | None:
    """What the error is or came from: ending a recording that lacked memory may fail in turn."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error
