"""`HttpLoad`: requests sent to one server, by the client of `nanoserve bench serve`, and what they took of whom."""

import time
from dataclasses import dataclass

import uvloop
from http_path.processor_seconds import ProcessorSeconds
from http_path.server_process import MODEL_NAME, ServerError, ServerProcess

from cluster.load_test.load_generator import LoadGenerator
from cluster.load_test.load_prompts import TokenPrompts
from cluster.load_test.load_target import LoadTarget, api_url
from cluster.load_test.request_outcome import RequestOutcome
from engine import PlannedRequest, SyntheticPrompts, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """`origin` is the monotonic time from which the outcomes count. `client` are the client's processor seconds."""

    outcomes: list[RequestOutcome]
    origin: float
    seconds: float
    client: float
    used: ProcessorSeconds

    @property
    def num_output_tokens(self) -> int:
        """Of all answers."""
        return sum(outcome.num_output_tokens for outcome in self.outcomes)


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLoad:
    """`num_requests` of one shape; `gap_seconds` apart, or all at once where it is None."""

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    vocab_size: int
    gap_seconds: float | None = None

    def run(self, server: ServerProcess, url: str, seed: int) -> LoadResult:
        """Send it all to `url`, which leads to `server`; raises `ServerError` where a request fails."""
        requests = tuple(
            PlannedRequest(
                num_prompt_tokens=self.num_prompt_tokens,
                num_output_tokens=self.num_output_tokens,
                arrival_seconds=None if self.gap_seconds is None else index * self.gap_seconds,
            )
            for index in range(self.num_requests)
        )
        generator = LoadGenerator(
            LoadTarget(url=api_url(url), model=MODEL_NAME, extra={"skip_special_tokens": False}),
            Workload(requests=requests, description="one shape"),
            TokenPrompts(synthetic=SyntheticPrompts(vocab_size=self.vocab_size, seed=seed)),
            concurrency=self.num_requests if self.gap_seconds is None else None,
        )
        earlier, wall, client = server.processor_seconds(), time.perf_counter(), time.process_time()
        outcomes = uvloop.run(generator.run())
        client, wall = time.process_time() - client, time.perf_counter() - wall
        used = server.processor_seconds().since(earlier)
        if failed := [outcome for outcome in outcomes if not outcome.is_ok]:
            raise ServerError(f"{len(failed)} of {len(outcomes)} requests failed: {failed[0].error} {failed[0].detail}")
        return LoadResult(outcomes=outcomes, origin=generator.origin, seconds=wall, client=client, used=used)
