"""`CallMetrics`: the clock of one API call, from its body to its end, as metrics."""

import time
from collections.abc import Collection, Sequence
from typing import Any

from cluster.api_call import ApiCall
from cluster.metrics import IngressMetrics
from cluster.recent_latencies import RecentLatencies
from engine import FinishReason, RequestId, TokenOutput


class CallMetrics:
    """Tell it every delivery, and `close` it; `answered` first, if all went well.

    `arrived` is when the last byte of the body was there, by the monotonic clock.
    """

    def __init__(self, metrics: IngressMetrics, latencies: RecentLatencies, call: ApiCall, arrived: float) -> None:
        self._metrics = metrics
        self._latencies = latencies
        self._call = call
        self._started = arrived
        self._first: float | None = None
        self._last = self._started
        self._reasons: list[str] = []
        self._is_answered = False

    def delivered(self, outputs: Sequence[TokenOutput], stopped: Collection[RequestId]) -> None:
        """One step's outputs; `stopped` are the requests that a stop string ended with it."""
        if not outputs:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self._metrics.first_token_came(now - self._started)
            self._latencies.first_token(now - self._started)
        else:
            self._metrics.inter_token_latency.observe(now - self._last)
        self._last = now
        self._reasons += [FinishReason.STOP.value] * len(stopped)
        for output in outputs:
            if output.finish_reason is not None and output.request_id not in stopped:
                self._reasons.append(output.finish_reason.value)

    def answered(self) -> None:
        """The client was given the whole answer."""
        self._is_answered = True
        usage = self._call.reply.usage()
        self._metrics.answered(usage.num_prompt_tokens, usage.num_completion_tokens)
        self._metrics.request_latency.observe(time.monotonic() - self._started)
        later_tokens = usage.num_completion_tokens - max(1, len(self._call.requests))
        per_token = 0.0
        if self._first is not None and later_tokens > 0:
            each = later_tokens / len(self._call.requests)
            per_token = (self._last - self._first) / each
            self._metrics.time_per_output_token.observe(per_token)
            self._latencies.per_token(per_token)
        if self._call.requests:
            self._metrics.judged((self._first or self._started) - self._started, per_token)
        for reason in self._reasons:
            self._metrics.finished(reason)

    def failed(self) -> None:
        """The server gave up on the call; that its client left, or asked for what cannot be, is not this."""
        self._metrics.failed(has_begun=self._first is not None)

    def facts(self) -> dict[str, Any]:
        """What a log or a trace says of the call, as it stands now."""
        usage = self._call.reply.usage()
        facts: dict[str, Any] = {
            "model": self._call.model.names[0],
            "response_id": self._call.response_id,
            "stream": self._call.stream,
            "prompt_tokens": usage.num_prompt_tokens,
            "cached_tokens": usage.num_cached_tokens,
            "completion_tokens": usage.num_completion_tokens,
            "finish_reasons": self._reasons,
        }
        if self._first is not None:
            facts["first_token_seconds"] = round(self._first - self._started, 6)
        return facts

    def close(self) -> None:
        """The call is over, well or not. Idempotent."""
        if not self._is_answered:
            self._is_answered = True
            usage = self._call.reply.usage()
            self._metrics.unanswered(usage.num_prompt_tokens, usage.num_completion_tokens)
