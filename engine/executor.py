"""The port between the control plane and whatever runs a `Batch`: one process, a worker group, or a simulation."""

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Protocol

from engine.batch import Batch, StepOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCapacity:
    """How many KV blocks fit, how many tokens each holds, and how fast a device multiplies; the same on every rank.

    The rates are floating-point operations per second of one device, measured where the ranks compute:
    `gemm_flops_per_second` is the peak, `dense_flops_per_second` what the model's own products reach at the full dense
    batch. None where nobody measured: then the percent of the optimum is unknown. `wide_flops_per_second` is the peak
    for products that are not in FP8, where the others are.
    """

    num_blocks: int
    block_size: int
    gemm_flops_per_second: float | None = None
    dense_flops_per_second: float | None = None
    wide_flops_per_second: float | None = None

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
