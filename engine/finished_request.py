"""`FinishedRequest`: the life of one request in the engine, told once, at its end."""

from dataclasses import dataclass

from engine.request import FinishReason, Request
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequest:
    """When a request came, was first part of a step, had its first token, and ended, in seconds of `time.monotonic`.

    `scheduled_at` and `first_token_at` are None for one that ended before. `finish_reason` is None where the engine
    died under it.
    """

    request: Request
    arrived_at: float
    scheduled_at: float | None
    first_token_at: float | None
    ended_at: float
    num_cached_tokens: int
    num_generated_tokens: int
    num_preemptions: int
    finish_reason: FinishReason | None

    @classmethod
    def of(cls, sequence: Sequence, finish_reason: FinishReason | None, now: float) -> "FinishedRequest":
        """What the sequence of a request that ends `now` knows of it."""
        return cls(
            request=sequence.request,
            arrived_at=sequence.arrived_at,
            scheduled_at=sequence.scheduled_at,
            first_token_at=sequence.first_token_at,
            ended_at=now,
            num_cached_tokens=sequence.num_cached_tokens,
            num_generated_tokens=sequence.num_generated,
            num_preemptions=sequence.num_preemptions,
            finish_reason=finish_reason,
        )
