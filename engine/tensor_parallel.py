"""`TensorParallel`: rank, size and collectives of one tensor-parallel group; passed to layers, never global."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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

    def all_gather(self, shard: Tensor) -> Tensor:
        """Concatenate every rank's `shard` [..., N] along the last dimension to [..., N * size]."""
        if self.size == 1:
            return shard
        parts = [torch.empty_like(shard) for _ in range(self.size)]
        dist.all_gather(parts, shard.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)
