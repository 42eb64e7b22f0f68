"""The port between the control plane and whatever runs a `Batch`: one process, a worker group, or a simulation."""

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Protocol

from engine.batch import Batch, StepOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCapacity:
    """How many KV blocks fit, and how many tokens each holds; the same on every rank."""

    num_blocks: int
    block_size: int

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values fit."""
        return self.num_blocks * self.block_size


class Executor(Protocol):
    """Runs batches in the order of the calls. `execute` may be called again before the last result is there."""

    def start(self) -> CacheCapacity:
        """Load the model on every rank and return the KV capacity; raises `ConfigError` for what cannot start."""
        ...

    def execute(self, batch: Batch) -> Awaitable[StepOutput]:
        """Run one step; raises `EngineDeadError` naming the rank when it cannot."""
        ...

    def close(self) -> None:
        """Stop every rank; idempotent."""
        ...
