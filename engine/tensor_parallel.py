"""`TensorParallel`: rank, size and collectives of one tensor-parallel group; passed to layers, never global.

On GPUs a group can have two more ways than its own to exchange something, see `engine.network`: a communicator that
takes few execution units, for collectives beside other work, and a faster one for small sums.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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


class SmallSums(Protocol):
    """Sums small messages over the ranks, on the current stream."""

    def takes(self, partial: Tensor) -> bool:
        """Whether this is one of them: the same answer on every rank."""
        ...

    def all_reduce(self, partial: Tensor) -> None:
        """Sum `partial` over the ranks, in place."""
        ...


@dataclass(slots=True)
class _Silence:
    """Whether collectives are left out."""

    is_on: bool = False


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """The group of ranks that share every layer of a model. `TensorParallel()` is a group of one, without a network.

    `narrow_group` has the same ranks and takes fewer execution units; where it is None, `group` serves.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    narrow_group: Any = field(default=None, compare=False)
    small_sums: SmallSums | None = field(default=None, compare=False)
    _silence: _Silence = field(default_factory=_Silence, compare=False, repr=False)

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Sum `partial` over the ranks, in place."""
        if self._has_network and not self._is_summed(partial):
            dist.all_reduce(partial, group=self.group)
        return partial

    def start_all_reduce(self, partial: Tensor, *, is_beside: bool = False) -> Collective | None:
        """Begin to sum `partial` over the ranks, in place; None where there is nothing to wait for but the current
        stream: in a group of one, and of a small message. `is_beside`: other work is computed at the same time.

        Every rank must start its collectives in the same order.
        """
        if not self._has_network or self._is_summed(partial):
            return None
        work: Collective = dist.all_reduce(partial, group=self._group(is_beside), async_op=True)
        return work

    def start_all_gather(self, joined: Tensor, shard: Tensor, *, is_beside: bool = False) -> Collective | None:
        """Begin to fill `joined` [..., N * size] with every rank's `shard` [..., N], side by side."""
        if not self._has_network:
            joined.copy_(torch.cat([shard] * self.size, dim=-1))
            return None
        parts = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(self.size)]
        group = self._group(is_beside)
        work: Collective = dist.all_gather(parts, shard.contiguous(), group=group, async_op=True)
        return _Gathering(work, parts, joined)

    def all_gather(self, shard: Tensor) -> Tensor:
        """Concatenate every rank's `shard` [..., N] along the last dimension to [..., N * size]."""
        if self.size == 1:
            return shard
        parts = [shard] * self.size
        if self._has_network:
            parts = [torch.empty_like(shard) for _ in range(self.size)]
            dist.all_gather(parts, shard.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Inside, collectives exchange nothing, and what they should have made is of the right shape and worthless.

        For a rank to try out by itself whether something runs: if it does not, no other rank waits for the rest of it.
        """
        self._silence.is_on = True
        try:
            yield
        finally:
            self._silence.is_on = False

    @property
    def _has_network(self) -> bool:
        return self.size > 1 and not self._silence.is_on

    def _is_summed(self, partial: Tensor) -> bool:
        """Whether it was a small message, and now is summed."""
        if self.small_sums is None or not self.small_sums.takes(partial):
            return False
        self.small_sums.all_reduce(partial)
        return True

    def _group(self, is_beside: bool) -> Any:
        return self.narrow_group if is_beside and self.narrow_group is not None else self.group


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
