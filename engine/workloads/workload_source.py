"""`WorkloadSource`: the options that describe a benchmark's requests, and the `Workload` that they stand for.

Lengths come from a trace, a named workload, or two ranges; arrivals from the trace or a Poisson process.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engine.errors import ConfigError
from engine.workloads.length_distribution import LengthRange
from engine.workloads.named_workload import NAMED_WORKLOADS, WorkloadName
from engine.workloads.request_trace import read_trace
from engine.workloads.workload import PlannedRequest, Workload

DEFAULT_NUM_REQUESTS = 100
DEFAULT_PROMPT = LengthRange(low=512, high=512)
DEFAULT_OUTPUT = LengthRange(low=128, high=128)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSource:
    """`trace` and `name` exclude each other; where neither is given, `prompt` and `output` are the lengths.

    `num_requests` None means all of a trace, or 100. `output` also stands in where a trace tells no output lengths.
    """

    prompt: LengthRange = DEFAULT_PROMPT
    output: LengthRange = DEFAULT_OUTPUT
    name: WorkloadName | None = None
    trace: Path | None = None
    num_requests: int | None = None
    length_divisor: int = 1
    time_scale: float = 1.0
    request_rate: float | None = None
    seed: int = 0

    def load(self) -> Workload:
        """Read or draw the requests; raises `ConfigError`. The same options give the same workload."""
        if self.trace is not None and self.name is not None:
            raise ConfigError(f"Choose one of the trace {self.trace} and the named workload {self.name}.")
        if self.num_requests is not None and self.num_requests < 1:
            raise ConfigError(f"The number of requests must be at least 1, but is {self.num_requests}.")
        if self.trace is not None:
            workload = self._complete(read_trace(self.trace, self.num_requests))
        else:
            workload = self._draw(self.num_requests or DEFAULT_NUM_REQUESTS)
        workload = workload.with_lengths_divided(self.length_divisor).with_time_stretched(self.time_scale)
        if self.request_rate is not None:
            workload = workload.with_poisson_arrivals(self.request_rate, self.seed)
        return workload

    def _draw(self, count: int) -> Workload:
        generator = np.random.default_rng(self.seed)
        if self.name is not None:
            pairs = NAMED_WORKLOADS[self.name].draw(count, generator)
            description = f"workload {self.name}"
        else:
            prompts = self.prompt.draw(count, generator).tolist()
            pairs = list(zip(prompts, self.output.draw(count, generator).tolist(), strict=True))
            description = f"{self.prompt} tokens in, {self.output} out"
        requests = tuple(PlannedRequest(num_prompt_tokens=prompt, num_output_tokens=output) for prompt, output in pairs)
        return Workload(requests=requests, description=description)

    def _complete(self, workload: Workload) -> Workload:
        """Output lengths where the trace has none."""
        lengths = self.output.draw(len(workload.requests), np.random.default_rng(self.seed)).tolist()
        requests = tuple(
            request if request.num_output_tokens else replace(request, num_output_tokens=length)
            for request, length in zip(workload.requests, lengths, strict=True)
        )
        return replace(workload, requests=requests)
