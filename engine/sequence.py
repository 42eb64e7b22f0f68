"""`Sequence`: one request's life inside the engine, from waiting to finished.

It holds what the host knows: the tokens that came back so far, and the blocks that hold their keys and values. The
token that a running step is about to draw exists only on the device until the engine, one step behind, appends it.
"""

import hashlib
from array import array
from enum import StrEnum

from engine.request import FinishReason, Request


class SequenceStatus(StrEnum):
    """WAITING for a row and blocks, RUNNING with both, FINISHED with neither."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """A request with its tokens, blocks and place in the queue; mutable.

    `order` is the order of arrival. `token_ids` are an array, which Python's garbage collector need not look through.
    `num_computed` counts the tokens whose keys and values have been computed or are scheduled to be (kept only while
    the prompt is computed; a decoding sequence's position is the scheduler's).
    `num_lost` positions at its front were computed once and given up by a preemption.
    `num_registered_blocks` of `block_ids` are offered to other sequences as prefixes.
    """

    __slots__ = (
        "arrived_at",
        "block_hashes",
        "block_ids",
        "finish_reason",
        "first_token_at",
        "num_cached_tokens",
        "num_computed",
        "num_lost",
        "num_preemptions",
        "num_prompt_tokens",
        "num_registered_blocks",
        "order",
        "request",
        "row",
        "scheduled_at",
        "status",
        "token_ids",
    )

    def __init__(self, request: Request, order: int, arrived_at: float) -> None:
        self.request = request
        self.order = order
        self.arrived_at = arrived_at
        self.scheduled_at: float | None = None
        self.first_token_at: float | None = None
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.token_ids = array("i", request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.row = -1
        self.num_computed = 0
        self.num_lost = 0
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_registered_blocks = 0

    @property
    def num_generated(self) -> int:
        """Tokens drawn and known to the host."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def max_length(self) -> int:
        """Prompt and generated tokens together when the request ends by its limit."""
        return self.num_prompt_tokens + self.request.sampling.max_tokens

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller goes first: higher priority, then earlier arrival."""
        return (-self.request.priority, self.order)

    def __lt__(self, other: "Sequence") -> bool:
        return self.rank < other.rank

    def hash_blocks(self, block_size: int) -> list[bytes]:
        """Hashes of all full blocks of known tokens; each depends on every token before it and on the cache salt."""
        hashes = self.block_hashes
        num_full = len(self.token_ids) // block_size
        if num_full > len(hashes):
            parent = hashes[-1] if hashes else _digest(self.request.cache_salt.encode())
            data = self.token_ids[len(hashes) * block_size : num_full * block_size].tobytes()
            num_bytes = block_size * self.token_ids.itemsize
            for start in range(0, len(data), num_bytes):
                parent = _digest(parent + data[start : start + num_bytes])
                hashes.append(parent)
        return hashes


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
