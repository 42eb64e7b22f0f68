"""`PendingStep`: a step that has been launched; `wait` blocks until its drawn tokens are on the host.

On a CPU the work is done before this object exists. On a GPU the tokens travel on a copy stream and `wait`
synchronises with that copy alone, so that later steps may already be queued.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from engine.batch import StepOutput, StepTimes
from engine.recorded_step import RecordedStep
from engine.request import TokenLogprob
from engine.sampler import Drawn
from engine.sampling_table import SamplingPlan
from engine.step_clock import StepClock


class PendingStep:
    """One launched step: what it drew, on its way to the host."""

    def __init__(
        self,
        step: int,
        plan: SamplingPlan | None,
        drawn: Drawn | None,
        clock: StepClock,
        copies: torch.cuda.Stream | None,
        *,
        plan_name: str,
        times: StepTimes | Callable[[float], StepTimes] | None,
        num_padding_tokens: int = 0,
        skips_tail: bool = False,
        recorded: RecordedStep | None = None,
    ) -> None:
        """`times`: the parts of the step's time, where they are known, or what makes them of its seconds."""
        self.recorded = recorded
        self._step = step
        self._plan_name = plan_name
        self._times = times
        self._num_padding_tokens = num_padding_tokens
        self._skips_tail = skips_tail
        self._plan = plan
        self._clock = clock
        self._copied: torch.cuda.Event | None = None
        self._drawn = drawn
        if drawn is not None and copies is not None:
            self._drawn = self._start_copy(drawn, copies)

    def _start_copy(self, drawn: Drawn, copies: torch.cuda.Stream) -> Drawn:
        """Queue the copies to pinned memory behind the work launched so far."""
        copies.wait_stream(torch.cuda.current_stream(drawn.token_ids.device))

        def to_host(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            tensor.record_stream(copies)
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

        with torch.cuda.stream(copies):
            token_ids = to_host(drawn.token_ids)
            assert token_ids is not None
            host = Drawn(
                token_ids=token_ids,
                logprobs=to_host(drawn.logprobs),
                top_logprobs=to_host(drawn.top_logprobs),
                top_token_ids=to_host(drawn.top_token_ids),
            )
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        return host

    def wait(self) -> StepOutput:
        """The step's output, as soon as its tokens are on the host; errors of the device surface here."""
        if self._copied is not None:
            self._copied.synchronize()
        seconds = self._clock.seconds()
        token_ids = np.empty(0, np.int32) if self._drawn is None else self._drawn.token_ids.numpy().astype(np.int32)
        return StepOutput(
            step=self._step,
            token_ids=token_ids,
            logprobs=self._logprobs(len(token_ids)),
            device_seconds=seconds,
            times=self._times(seconds) if callable(self._times) else self._times,
            plan=self._plan_name,
            num_padding_tokens=self._num_padding_tokens,
            skips_tail=self._skips_tail,
        )

    def _logprobs(self, num_drawn: int) -> tuple[TokenLogprob | None, ...] | None:
        """The log-probabilities of the rows that asked, at their places among all drawn tokens."""
        if self._plan is None or self._drawn is None or self._drawn.logprobs is None:
            return None
        assert self._drawn.top_logprobs is not None and self._drawn.top_token_ids is not None
        entries: list[TokenLogprob | None] = [None] * num_drawn
        asked = zip(
            self._plan.logprobs_indices.tolist(),
            self._plan.num_top.tolist(),
            self._drawn.logprobs.tolist(),
            self._drawn.top_token_ids.tolist(),
            self._drawn.top_logprobs.tolist(),
            strict=True,
        )
        for index, num_top, logprob, token_ids, values in asked:
            top = tuple(zip(token_ids[:num_top], values[:num_top], strict=True))
            entries[index] = TokenLogprob(logprob=logprob, top=top)
        return tuple(entries)
