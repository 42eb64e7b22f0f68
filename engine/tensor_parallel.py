"""`TensorParallel`: rank, size and collectives of one tensor-parallel group; passed to layers, never global."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Collective(Protocol):
    """A collective in flight; the tensors it was given belong to it until `wait` returns."""

    def wait(self) -> object:
        """Block until this rank's part is done (on a GPU: make the current stream wait)."""
        ...

    def get_future(self) -> Any:
        """A future of torch that is done when the network is, whether or not anybody waits."""
        ...


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """The group of ranks that share every layer of a model. `TensorParallel()` is a group of one, without a network."""

    rank: int = 0
    size: int = 1
    group: Any = None

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Sum `partial` over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(partial, group=self.group)
        return partial

    def start_all_reduce(self, partial: Tensor) -> Collective | None:
        """Begin to sum `partial` over the ranks, in place; None in a group of one, where there is nothing to do.

        Every rank must start its collectives in the same order.
        """
        if self.size == 1:
            return None
        work: Collective = dist.all_reduce(partial, group=self.group, async_op=True)
        return work

    def start_all_gather(self, joined: Tensor, shard: Tensor) -> Collective | None:
        """Begin to fill `joined` [..., N * size] with every rank's `shard` [..., N], side by side."""
        if self.size == 1:
            joined.copy_(shard)
            return None
        parts = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(self.size)]
        work: Collective = dist.all_gather(parts, shard.contiguous(), group=self.group, async_op=True)
        return _Gathering(work, parts, joined)

    def all_gather(self, shard: Tensor) -> Tensor:
        """Concatenate every rank's `shard` [..., N] along the last dimension to [..., N * size]."""
        if self.size == 1:
            return shard
        parts = [torch.empty_like(shard) for _ in range(self.size)]
        dist.all_gather(parts, shard.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)


@dataclass(frozen=True, slots=True)
class _Gathering:
    """A gather whose parts are still to be laid side by side."""

    work: Collective
    parts: list[Tensor]
    joined: Tensor

    def wait(self) -> None:
        """See `Collective`."""
        self.work.wait()
        torch.cat(self.parts, dim=-1, out=self.joined)

    def get_future(self) -> Any:
        """See `Collective`."""
        return self.work.get_future()
