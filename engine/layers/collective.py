"""The collectives of tensor parallelism as operations, so that a pipeline can run them beside others."""

from torch import Tensor

from engine.batch_shape import BatchShape
from engine.operation import Operation, Resource, Work
from engine.tensor_parallel import Collective, TensorParallel


class CollectiveOperation(Operation):
    """An operation of the network that can be begun and waited for later."""

    resource = Resource.NETWORK

    def __init__(self, tensor_parallel: TensorParallel, width: int) -> None:
        """`width` is that of the result, which every rank gets."""
        super().__init__()
        self.tensor_parallel = tensor_parallel
        self.width = width

    @property
    def is_identity(self) -> bool:
        """In a group of one there is nothing to exchange."""
        return self.tensor_parallel.size == 1

    def start(self, output: Tensor, input: Tensor, *, is_beside: bool = False) -> Collective | None:
        """Begin to compute `output`; None where it is there at once. Ranks must start theirs in the same order.

        `is_beside`: other work is computed meanwhile, for which the network should leave execution units.
        """
        raise NotImplementedError

    def into(self, output: Tensor, input: Tensor, *, is_beside: bool = False) -> None:  # type: ignore[override]
        """As `forward`, with the result in `output`, which may be the input itself where that `is_in_place`."""
        collective = self.start(output, input, is_beside=is_beside)
        if collective is not None:
            collective.wait()


class AllReduce(CollectiveOperation):
    """Sums the ranks' partial results; may reuse its input's memory."""

    is_in_place = True

    def forward(self, partial_TE: Tensor) -> Tensor:
        """[T, E] of this rank -> [T, E], the same on every rank."""
        return self.tensor_parallel.all_reduce(partial_TE)

    def start(self, output_TE: Tensor, partial_TE: Tensor, *, is_beside: bool = False) -> Collective | None:
        """Begin what `into` does; the result is there when the collective has been waited for."""
        if output_TE.data_ptr() != partial_TE.data_ptr():
            output_TE.copy_(partial_TE)
        return self.tensor_parallel.start_all_reduce(output_TE, is_beside=is_beside)

    def work(self, shape: BatchShape, element_bytes: int) -> Work:
        """A ring in two rounds: every rank sends (N - 1) / N of the values twice, and adds those it gets first."""
        num_sent = _sent_share(self.tensor_parallel) * shape.num_tokens * self.width
        num_bytes = 2 * num_sent * element_bytes
        return Work(flops=num_sent, sharded_bytes=num_bytes, network_bytes=num_bytes)


class AllGather(CollectiveOperation):
    """Joins the ranks' shares of the last dimension."""

    def forward(self, shard_TV: Tensor) -> Tensor:
        """[T, V / size] of this rank -> [T, V], the same on every rank."""
        return self.tensor_parallel.all_gather(shard_TV)

    def start(self, output_TV: Tensor, shard_TV: Tensor, *, is_beside: bool = False) -> Collective | None:
        """Begin what `into` does; the result is there when the collective has been waited for."""
        return self.tensor_parallel.start_all_gather(output_TV, shard_TV, is_beside=is_beside)

    def work(self, shape: BatchShape, element_bytes: int) -> Work:
        """A ring in one round: every rank sends (N - 1) / N of the result, its own shard and those it passes on."""
        num_bytes = _sent_share(self.tensor_parallel) * shape.num_tokens * self.width * element_bytes
        return Work(sharded_bytes=num_bytes, network_bytes=num_bytes)


def _sent_share(tensor_parallel: TensorParallel) -> float:
    """(N - 1) / N: of the values of a collective, those that leave a rank in one round of a ring."""
    return (tensor_parallel.size - 1) / tensor_parallel.size
