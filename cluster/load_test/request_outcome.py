"""`RequestOutcome`: what became of one request of a load test; times in seconds since the start of the test."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestOutcome:
    """`error` is None for a request that was answered in full, else the kind of failure, with `detail`.

    `scheduled_at` is when it was due and `sent_at` when the client really began; latencies count from `scheduled_at`,
    so that a client that falls behind cannot hide what its users would have waited. `gaps` are the times between
    successive arrivals of output.
    """

    index: int
    scheduled_at: float
    sent_at: float
    ended_at: float
    error: str | None = None
    detail: str = ""
    first_output_at: float | None = None
    last_output_at: float | None = None
    num_planned_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    has_usage: bool = True
    gaps: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    @property
    def is_ok(self) -> bool:
        """Whether the whole answer came."""
        return self.error is None

    @property
    def lag(self) -> float:
        """How late the client was."""
        return self.sent_at - self.scheduled_at

    @property
    def time_to_first_token(self) -> float | None:
        """From the scheduled time to the first output."""
        return None if self.first_output_at is None else self.first_output_at - self.scheduled_at

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds per token after the first; None for fewer than two tokens."""
        if self.first_output_at is None or self.last_output_at is None or self.num_output_tokens < 2:
            return None
        return (self.last_output_at - self.first_output_at) / (self.num_output_tokens - 1)

    @property
    def end_to_end(self) -> float:
        """From the scheduled time to the end of the answer."""
        return self.ended_at - self.scheduled_at
