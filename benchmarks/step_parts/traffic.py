"""`Traffic`: requests that keep a number of sequences running: as one ends another comes, with ShareGPT's lengths.

The first of them are in the middle of their answers, as those are that one finds running: drawn in proportion to their
lengths, at an age anywhere in between. So ends and arrivals are spread over the steps from the first step on, and are
as many per step as they stay to be. Half of the prompts begin with one of a few shared prompts, so that the prefix
cache finds something.
"""

from typing import Final

import numpy as np

from engine import Request, RequestId, SamplingParams
from engine.workloads.named_workload import NAMED_WORKLOADS, WorkloadName

WORKLOAD: Final = WorkloadName.SHAREGPT
_NUM_SHARED_PROMPTS = 16
_SHARED_TOKENS = 128
_SAMPLE = 4096  # lengths drawn at once


class Traffic:
    """`standing` first, then `arrivals`; the same every time."""

    def __init__(self, num_running: int, *, vocab_size: int, max_model_len: int, seed: int = 0) -> None:
        self._num_running = num_running
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._generator = np.random.default_rng(seed)
        self._shared = self._generator.integers(0, vocab_size, (_NUM_SHARED_PROMPTS, _SHARED_TOKENS))
        self._lengths: list[tuple[int, int]] = []
        self._num_requests = 0

    def standing(self) -> list[Request]:
        """The requests that run at the start: what they have answered so far is part of their prompts."""
        lengths = np.array(self._draw())
        outputs = lengths[:, 1]
        chosen = lengths[self._generator.choice(len(lengths), self._num_running, p=outputs / outputs.sum())]
        ages = self._generator.integers(0, chosen[:, 1])
        return [
            self._request(prompt + age, output - age)
            for (prompt, output), age in zip(chosen.tolist(), ages.tolist(), strict=True)
        ]

    def arrivals(self, count: int) -> list[Request]:
        """The next `count` requests."""
        while len(self._lengths) < count:
            self._lengths += self._draw()
        lengths, self._lengths = self._lengths[:count], self._lengths[count:]
        return [self._request(prompt, output) for prompt, output in lengths]

    def _draw(self) -> list[tuple[int, int]]:
        pairs = NAMED_WORKLOADS[WORKLOAD].draw(_SAMPLE, self._generator)
        return [(min(prompt, self._max_model_len - output), output) for prompt, output in pairs]

    def _request(self, num_prompt_tokens: int, num_output_tokens: int) -> Request:
        prompt = self._generator.integers(0, self._vocab_size, num_prompt_tokens)
        if self._num_requests % 2:
            shared = self._shared[self._generator.integers(_NUM_SHARED_PROMPTS)]
            num_shared = min(num_prompt_tokens, _SHARED_TOKENS)
            prompt[:num_shared] = shared[:num_shared]
        self._num_requests += 1
        return Request(
            request_id=RequestId(f"request-{self._num_requests}"),
            prompt_token_ids=tuple(prompt.tolist()),
            sampling=SamplingParams(max_tokens=num_output_tokens, temperature=0.0),
        )
