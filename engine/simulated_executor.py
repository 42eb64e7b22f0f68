"""`SimulatedExecutor`: the `Executor` port without a model, for tests, planning and measuring the control plane.

It keeps the same row tables as a real rank would, checks that every batch is consistent with them, and draws tokens
by a rule of (row's prompt, position), so that the same request gets the same tokens in any batch.
"""

import asyncio
from collections.abc import Callable

import numpy as np

from engine.batch import Batch, IntArray, StepOutput
from engine.executor import CacheCapacity


class SimulatedExecutor:
    """Takes `step_seconds(batch)` per step, one step after the other; token = rule(row's seed and prompt, position)."""

    def __init__(
        self,
        capacity: CacheCapacity,
        *,
        vocab_size: int,
        step_seconds: Callable[[Batch], float] = lambda batch: 0.0,
    ) -> None:
        self._capacity = capacity
        self._vocab_size = vocab_size
        self._step_seconds = step_seconds
        self._keys: dict[int, int] = {}
        self._lengths: dict[int, int] = {}
        self._blocks: dict[int, dict[int, int]] = {}
        self._device = asyncio.Lock()
        self.batches: list[Batch] = []

    def start(self) -> CacheCapacity:
        """Nothing to load."""
        return self._capacity

    async def execute(self, batch: Batch) -> StepOutput:
        """Check the batch, wait as long as it would take, and draw its tokens."""
        async with self._device:
            self.batches.append(batch)
            self._apply(batch)
            seconds = self._step_seconds(batch)
            await asyncio.sleep(seconds)
            return StepOutput(step=batch.step, token_ids=self._draw(batch), device_seconds=seconds)

    def close(self) -> None:
        """Nothing to stop."""

    def _apply(self, batch: Batch) -> None:
        for admission in batch.admissions:
            prompt = admission.token_ids[: admission.num_prompt_tokens].tolist()
            self._keys[admission.row] = hash((admission.sampling.seed, *prompt))
            self._lengths[admission.row] = len(admission.token_ids)
            self._blocks[admission.row] = {}
        for row, index, block_id in batch.block_updates.tolist():
            assert 0 <= block_id < self._capacity.num_blocks
            self._blocks[row][index] = block_id
        for row, start, count in zip(batch.rows.tolist(), batch.starts.tolist(), batch.counts.tolist(), strict=True):
            assert start + count <= self._lengths[row], "a step computes tokens that nobody has drawn"
            last_block = (start + count - 1) // self._capacity.block_size
            assert all(index in self._blocks[row] for index in range(last_block + 1)), "a row lacks a block"

    def _draw(self, batch: Batch) -> IntArray:
        tokens = []
        for index in batch.sampled.tolist():
            row = int(batch.rows[index])
            position = int(batch.starts[index] + batch.counts[index])
            assert position == self._lengths[row], "a token is drawn twice or one is skipped"
            self._lengths[row] = position + 1
            tokens.append(hash((self._keys[row], position)) % self._vocab_size)
        return np.asarray(tokens, np.int32)
