"""The requests that every engine gets: "32x128/128" (requests x tokens in / out) or "64xazure-conversation/8".

The latter are the lengths of a named workload divided by a number. Every round has prompts of its own, so that no
engine finds in a prefix cache what it computed in the round before.
"""

import re

from engine.errors import ConfigError
from engine.workloads.length_distribution import LengthRange
from engine.workloads.named_workload import WorkloadName
from engine.workloads.synthetic_prompt import SyntheticPrompts
from engine.workloads.workload import Workload
from engine.workloads.workload_source import WorkloadSource


def parse_workload(text: str) -> Workload:
    """Raises `ConfigError` for text of neither form."""
    if match := re.fullmatch(r"(\d+)x(\d+)/(\d+)", text):
        count, prompt, output = map(int, match.groups())
        return WorkloadSource(
            prompt=LengthRange(low=prompt, high=prompt),
            output=LengthRange(low=output, high=output),
            num_requests=count,
        ).load()
    match = re.fullmatch(r"(\d+)x([a-z0-9-]+)/(\d+)", text)
    if match is None or match[2] not in set(WorkloadName):
        raise ConfigError(
            f"The workload {text!r} must be like 32x128/128 (requests x tokens in / tokens out) or 64xNAME/8 (lengths "
            f"of a service divided by 8), NAME being {', '.join(WorkloadName)}."
        )
    return WorkloadSource(name=WorkloadName(match[2]), num_requests=int(match[1]), length_divisor=int(match[3])).load()


def make_requests(workload: Workload, vocab_size: int, seed: int) -> list[tuple[list[int], int]]:
    """(prompt, number of output tokens) of each request; another `seed` makes other prompts of the same lengths."""
    prompts = SyntheticPrompts(vocab_size=vocab_size, seed=seed)
    return [
        (prompts.token_ids(workload, index), request.num_output_tokens)
        for index, request in enumerate(workload.requests)
    ]
