"""Virtual ranks: the shards of a tensor-parallel group in one process on one device, to study how its network overlaps.

Several ranks of NCCL cannot share a GPU. Here every product of the layers is cut as over so many ranks, one product
after the other; those that are cut along their inputs leave a partial sum of every rank side by side, and an all-reduce
adds them up: a node of the network as in a real group, which a schedule may put beside other work, on a few programs.
Attention, norms and all else work on all heads and columns at once. A network is thereby exercised, with its order
and its buffers, and never timed: what is measured is an emulation, and has to be called one.

Shapes: T tokens, V virtual ranks, E hidden.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from engine.batch_shape import BatchShape
from engine.errors import ConfigError
from engine.layers.collective import AllReduce, CollectiveOperation
from engine.layers.linear import ColumnParallelLinear, Linear, QKVLinear, RowParallelLinear
from engine.layers.mixture_of_experts import MixtureOfExperts
from engine.models.decoder import Decoder
from engine.operation import Operation, Resource, Work
from engine.tensor_parallel import Collective, TensorParallel

MAX_VIRTUAL_RANKS = 8


def use_virtual_ranks(model: Decoder, num_ranks: int, *, num_ctas: int | None = None) -> None:
    """Cut the layers of a model that has its weights, as one rank of a group of one, over so many virtual ranks.

    `num_ctas` limits the programs of an all-reduce that runs beside other work. The model must not have been traced.
    Raises `ConfigError` for what cannot be cut.
    """
    if not 2 <= num_ranks <= MAX_VIRTUAL_RANKS:
        raise ConfigError(f"There can be 2..{MAX_VIRTUAL_RANKS} virtual ranks, not {num_ranks}.")
    for parent in list(model.layers.modules()):
        if isinstance(parent, MixtureOfExperts):
            raise ConfigError("Virtual ranks are for dense models: experts are not cut over them.")
        for name, child in list(parent.named_children()):
            if isinstance(child, AllReduce):
                setattr(parent, name, VirtualAllReduce(num_ranks, child.width, num_ctas))
            elif isinstance(child, QKVLinear | ColumnParallelLinear | RowParallelLinear):
                setattr(parent, name, VirtualLinear(child, num_ranks))


class VirtualLinear(Operation):
    """The products of all ranks, each as the layer computes it.

    Cut along outputs, [T, I] -> [T, O] as of the whole; cut along inputs, [T, I] -> [T, V O], partial sums side by
    side.
    """

    resource = Resource.COMPUTE

    def __init__(self, whole: Linear, num_ranks: int) -> None:
        super().__init__()
        if whole.weight.is_mkldnn:
            raise ConfigError("A weight that was packed for a CPU cannot be cut over virtual ranks: cut it before.")
        self.cuts_inputs = isinstance(whole, RowParallelLinear)
        num_outputs, num_inputs = whole.weight.shape
        cut, size = ("inputs", num_inputs) if self.cuts_inputs else ("outputs", num_outputs)
        if size % num_ranks:
            raise ConfigError(f"{num_ranks} virtual ranks cannot share the {size} {cut} of a product evenly.")
        dimension, width = (1 if self.cuts_inputs else 0), size // num_ranks
        self.shards = nn.ModuleList(
            _shard(whole, dimension, slice(rank * width, (rank + 1) * width), rank) for rank in range(num_ranks)
        )
        self.width = num_outputs * num_ranks if self.cuts_inputs else num_outputs

    def forward(self, input_TI: Tensor) -> Tensor:
        """See the class."""
        output_TX = input_TI.new_empty(input_TI.shape[0], self.width)
        self.into(output_TX, input_TI)
        return output_TX

    def into(self, output_TX: Tensor, input_TI: Tensor) -> None:  # type: ignore[override]
        """As `forward`, every product into its columns."""
        num_ranks = len(self.shards)
        outputs = output_TX.chunk(num_ranks, dim=1)
        inputs = input_TI.chunk(num_ranks, dim=1) if self.cuts_inputs else (input_TI,) * num_ranks
        for shard, output_TO, part_TI in zip(self.shards, outputs, inputs, strict=True):
            if shard.weight_scale is None:
                shard.into(output_TO, part_TI)
            else:  # values are quantised in adjacent rows
                output_TO.copy_(shard(part_TI.contiguous()))

    def work(self, shape: BatchShape, element_bytes: int) -> Work:
        """Of all ranks."""
        return sum((shard.work(shape, element_bytes) for shard in self.shards), Work())  # type: ignore[operator]


def _shard(whole: Linear, dimension: int, part: slice, rank: int) -> Linear:
    """A rank's part of a product, in the whole's memory where it is adjacent; rank 0 adds a bias that is not cut."""
    with torch.device("meta"):
        shard = type(whole).__new__(type(whole))
        Linear.__init__(shard, 1, 1)
    cuts_outputs = dimension == 0
    weight_OI = whole.weight.data[part] if cuts_outputs else whole.weight.data[:, part].contiguous()
    shard.weight = nn.Parameter(weight_OI, requires_grad=False)
    for name in ("bias", "weight_scale"):
        values = getattr(whole, name)
        if values is not None and (cuts_outputs or name == "weight_scale" or rank == 0):
            setattr(shard, name, nn.Parameter(values.data[part] if cuts_outputs else values.data, requires_grad=False))
    return shard


class VirtualAllReduce(CollectiveOperation):
    """Adds up the partial sums of all ranks: in float32, in their order, rounded once. The result has its own place.

    `add(partials, output, num_ctas)` does it: on a GPU our kernel, elsewhere torch.
    """

    def __init__(self, num_ranks: int, width: int, num_ctas: int | None) -> None:
        super().__init__(TensorParallel(), width)
        self.num_ranks = num_ranks
        self.num_ctas = num_ctas
        self.add: Callable[[Sequence[Tensor], Tensor, int | None], object] = _add

    @property
    def is_identity(self) -> bool:
        """There is something to add up though the group has one rank."""
        return False

    def forward(self, partials_TX: Tensor) -> Tensor:
        """[T, V E] -> [T, E]."""
        output_TE = partials_TX.new_empty(partials_TX.shape[0], self.width)
        self.start(output_TE, partials_TX)
        return output_TE

    def start(self, output_TE: Tensor, partials_TX: Tensor, *, is_beside: bool = False) -> Collective | None:
        """All of it, on the current stream; `is_beside` others, on `num_ctas` programs at most."""
        partials = partials_TX.chunk(self.num_ranks, dim=1)
        self.add(partials, output_TE, self.num_ctas if is_beside else None)
        return None

    def work(self, shape: BatchShape, element_bytes: int) -> Work:
        """What is read and written here; as network bytes, what a rank of a ring would send (see `AllReduce`)."""
        num_elements = shape.num_tokens * self.width
        return Work(
            flops=(self.num_ranks - 1) * num_elements,
            sharded_bytes=(self.num_ranks + 1) * num_elements * element_bytes,
            network_bytes=2 * (self.num_ranks - 1) / self.num_ranks * num_elements * element_bytes,
        )


def _add(partials: Sequence[Tensor], output_TE: Tensor, num_ctas: int | None) -> None:
    if output_TE.is_cuda:
        from engine.kernels.gpu.all_reduce_add import add_partials

        add_partials(partials, output_TE, num_ctas=num_ctas)
        return
    wide = torch.promote_types(output_TE.dtype, torch.float32)
    total_TE = partials[0].to(wide)
    for partial_TE in partials[1:]:
        total_TE = total_TE + partial_TE.to(wide)
    output_TE.copy_(total_TE)
