"""The collectives of tensor parallelism as operations, so that a pipeline can run them beside others."""

from torch import Tensor

from engine.operation import Operation, Resource
from engine.tensor_parallel import TensorParallel


class AllReduce(Operation):
    """Sums the ranks' partial results; may reuse its input's memory."""

    resource = Resource.NETWORK
    is_in_place = True

    def __init__(self, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        self.tensor_parallel = tensor_parallel

    def forward(self, partial_TE: Tensor) -> Tensor:
        """[T, E] of this rank -> [T, E], the same on every rank."""
        return self.tensor_parallel.all_reduce(partial_TE)


class AllGather(Operation):
    """Joins the ranks' shares of the last dimension."""

    resource = Resource.NETWORK

    def __init__(self, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        self.tensor_parallel = tensor_parallel

    def forward(self, shard_TV: Tensor) -> Tensor:
        """[T, V / size] of this rank -> [T, V], the same on every rank."""
        return self.tensor_parallel.all_gather(shard_TV)
