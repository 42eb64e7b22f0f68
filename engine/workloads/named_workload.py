"""Length distributions of real services under a name, for measuring where their traces are not at hand.

Each is a pair of lognormals cut at the longest length seen. `median` and `maximum` are the trace's own, `sigma` is
such that the mean after the cut equals the trace's mean: the token load and the typical request are right, the tails
only roughly (in the 99th percentile of prompts up to 60 % off). `correlation` is that of the logarithms.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

from engine.workloads.length_distribution import LognormalLengths


class WorkloadName(StrEnum):
    """The services whose lengths are known."""

    AZURE_CONVERSATION = "azure-conversation"
    LMSYS = "lmsys"
    SHAREGPT = "sharegpt"
    DEEPSEEK_R1 = "deepseek-r1"


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedWorkload:
    """Prompt and output lengths fitted to a trace; `source` says which."""

    prompt: LognormalLengths
    output: LognormalLengths
    correlation: float
    source: str

    def draw(self, count: int, generator: np.random.Generator) -> list[tuple[int, int]]:
        """`count` pairs of (prompt tokens, output tokens)."""
        normal = generator.standard_normal((2, count))
        rho = self.correlation
        prompt = self.prompt.from_normal(normal[0])
        output = self.output.from_normal(rho * normal[0] + (1 - rho**2) ** 0.5 * normal[1])
        return list(zip(prompt.tolist(), output.tolist(), strict=True))


NAMED_WORKLOADS: Final = {
    WorkloadName.AZURE_CONVERSATION: NamedWorkload(
        prompt=LognormalLengths(median=1033, sigma=0.609, maximum=14050),
        output=LognormalLengths(median=134, sigma=1.065, maximum=1000),
        correlation=0.03,
        source="Microsoft Azure, Azure Public Dataset, LLM inference trace 2023 (conversation), first 30 minutes; "
        "10,108 requests, mean 1,243 in and 217 out; CC-BY-4.0",
    ),
    WorkloadName.LMSYS: NamedWorkload(
        prompt=LognormalLengths(median=28, sigma=1.558, maximum=3894),
        output=LognormalLengths(median=140, sigma=0.887, maximum=4819),
        correlation=0.20,
        source="lengths of LMSYS-Chat-1M as published with NanoFlow (efeslab/Nanoflow, Apache-2.0); "
        "100,000 requests, mean 92 in and 207 out",
    ),
    WorkloadName.SHAREGPT: NamedWorkload(
        prompt=LognormalLengths(median=36, sigma=2.141, maximum=8073),
        output=LognormalLengths(median=280, sigma=0.534, maximum=3323),
        correlation=0.10,
        source="lengths of ShareGPT as published with NanoFlow (efeslab/Nanoflow, Apache-2.0), those of at most 8,192 "
        "in and 4,096 out; 58,728 requests, mean 278 in and 323 out",
    ),
    WorkloadName.DEEPSEEK_R1: NamedWorkload(
        prompt=LognormalLengths(median=122, sigma=2.208, maximum=37513),
        output=LognormalLengths(median=2007, sigma=0.903, maximum=24887),
        correlation=-0.13,
        source="an hour drawn from ServeGen's DeepSeek-R1 clients (alibaba/ServeGen, Apache-2.0); "
        "7,156 requests, mean 1,085 in and 2,994 out",
    ),
}
