"""Prompts without meaning but of exact length: random token ids, shared where the workload says that they are.

A prompt depends only on (seed, index of the request, its block ids): two runs send the same, and two requests share
exactly the blocks whose ids they share.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError
from engine.workloads.workload import PlannedRequest, Workload

_BLOCK_STREAM, _TAIL_STREAM = 1, 2  # keep a block's draws apart from those of a request of the same number


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticPrompts:
    """Draws token ids from `first_id` up to, not including, `vocab_size`."""

    vocab_size: int
    first_id: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.first_id < self.vocab_size:
            raise ConfigError(f"There are no token ids from {self.first_id} up to a vocabulary of {self.vocab_size}.")

    def token_ids(self, workload: Workload, index: int) -> list[int]:
        """The prompt of request `index` of `workload`."""
        request = workload.requests[index]
        blocks = [self._draw(workload.block_tokens, _BLOCK_STREAM, block) for block in self._blocks(workload, request)]
        missing = request.num_prompt_tokens - workload.block_tokens * len(blocks)
        blocks.append(self._draw(max(0, missing), _TAIL_STREAM, index))
        token_ids: list[int] = np.concatenate(blocks)[: request.num_prompt_tokens].tolist()
        return token_ids

    def _blocks(self, workload: Workload, request: PlannedRequest) -> tuple[int, ...]:
        """Ids of the blocks that lie at least partly inside the prompt."""
        return request.block_ids[: -(-request.num_prompt_tokens // workload.block_tokens)]

    def _draw(self, count: int, stream: int, number: int) -> NDArray[np.int64]:
        generator = np.random.default_rng((self.seed, stream, number))
        return generator.integers(self.first_id, self.vocab_size, size=count)
