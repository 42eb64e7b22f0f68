"""`Workload`: requests by their lengths and arrival times, and what may honestly be changed about them.

It knows token counts, not tokens: `synthetic_prompt` makes prompts of it. Lengths and arrivals are scaled together and
never drawn anew, because that would destroy what makes a trace worth replaying: bursts, and long prompts that come
with short outputs.
"""

from dataclasses import dataclass, replace

import numpy as np

from engine.errors import ConfigError

TRACE_BLOCK_TOKENS = 512  # what one entry of `PlannedRequest.block_ids` stands for in an unscaled trace


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One request to come. `arrival_seconds` counts from the start; None where nothing says when it comes.

    `block_ids` are the blocks that the prompt starts with; prompts with equal ids share those tokens. Output tokens
    of 0 mean that the source does not tell.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    arrival_seconds: float | None = None
    block_ids: tuple[int, ...] = ()

    def arriving(self, seconds: float | None) -> "PlannedRequest":
        """The same request at another time."""
        return replace(self, arrival_seconds=seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests in order of arrival. `description` says where they come from and how they were scaled."""

    requests: tuple[PlannedRequest, ...]
    description: str
    block_tokens: int = TRACE_BLOCK_TOKENS

    @property
    def has_arrivals(self) -> bool:
        """Whether the requests come at given times."""
        return all(request.arrival_seconds is not None for request in self.requests)

    @property
    def offered_rate(self) -> float | None:
        """Requests per second over the span of the arrivals; None without arrivals or with a single request."""
        last = self.requests[-1].arrival_seconds
        return (len(self.requests) - 1) / last if last else None

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(request.num_prompt_tokens for request in self.requests)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens of all requests."""
        return sum(request.num_output_tokens for request in self.requests)

    @property
    def longest(self) -> int:
        """Prompt and output tokens of the longest request."""
        return max(request.num_prompt_tokens + request.num_output_tokens for request in self.requests)

    def with_lengths_divided(self, divisor: int) -> "Workload":
        """All lengths divided by `divisor`, rounded up so that none becomes 0."""
        if divisor == 1:
            return self
        if divisor < 1:
            raise ConfigError(f"The length divisor must be at least 1, but is {divisor}.")
        requests = tuple(
            replace(
                request,
                num_prompt_tokens=-(-request.num_prompt_tokens // divisor),
                num_output_tokens=-(-request.num_output_tokens // divisor),
            )
            for request in self.requests
        )
        block_tokens = max(1, self.block_tokens // divisor)
        return replace(
            self,
            requests=requests,
            block_tokens=block_tokens,
            description=f"{self.description}, lengths divided by {divisor}",
        )

    def with_time_stretched(self, scale: float) -> "Workload":
        """All arrival times multiplied by `scale`: above 1 is slower than recorded."""
        if scale == 1:
            return self
        if scale <= 0 or not self.has_arrivals:
            raise ConfigError(f"Cannot stretch time by {scale:g}: it must be positive, and the trace must have times.")
        requests = tuple(request.arriving((request.arrival_seconds or 0.0) * scale) for request in self.requests)
        return replace(self, requests=requests, description=f"{self.description}, time stretched by {scale:g}")

    def with_poisson_arrivals(self, rate: float, seed: int) -> "Workload":
        """Independent arrivals, `rate` per second on average, the first at 0."""
        if rate <= 0:
            raise ConfigError(f"The request rate must be positive, but is {rate:g}.")
        gaps = np.random.default_rng(seed).exponential(1 / rate, size=len(self.requests))
        gaps[0] = 0.0
        times = np.cumsum(gaps).tolist()
        requests = tuple(request.arriving(time) for request, time in zip(self.requests, times, strict=True))
        return replace(self, requests=requests, description=f"{self.description}, Poisson arrivals at {rate:g}/s")

    def without_arrivals(self) -> "Workload":
        """For a closed loop: a request comes when another one has ended."""
        return replace(self, requests=tuple(request.arriving(None) for request in self.requests))
