"""`LossLedger`: books every second of an engine under the optimum or under the `Loss` that took it, as it passes.

Time is cut at events: a request comes to an idle engine, a step's result arrives, the engine runs out of requests.
Until a step has ended nothing of it is booked, so that totals never hold half a step. What passed since the last event
and was not the step's own is nobody's computing: results that come late by the host's clock are early for the next, so
over many steps that is the ranks' idle time to the last of them. Pure: the time is passed in.

A step's measured GEMM time is split by work, in tokens: `tokens * (1 - head) + drawn * head`, where `head` is the share
of the output head among the active parameters, because only drawn tokens meet it; where a step computes no others
behind its last attention, `head` is the share of all that lies there. With s the GEMM seconds per token
of this step, s* that of a full dense batch and s0 the optimum's:

    padding     s * padding rows          discarded   s * tokens dropped or computed again
    useful      s0 (ideal) + min(s, s*) - s0 (GEMM below its peak) + max(0, s - s*) (batch too small), per token

A batch of at least `FULL_SHARE` of the dense batch counts as full and has no small-batch loss. s* is the running mean
over such steps, which begins with the rate measured at the start: it needs no full batch ever to have come.
"""

import threading
from dataclasses import dataclass, field

from engine.batch import StepTimes
from engine.loss import Loss
from engine.optimum import Optimum

FULL_SHARE = 0.9
DENSE_MEAN_STEPS = 32  # s* follows a change of the machine's speed within so many full batches


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedStep:
    """A step as the ledger sees it: `num_drawn` of its `num_tokens` met the output head, and with `skips_tail` also
    what lies between the last attention and that.

    `num_recomputed` of the tokens were computed before and lost, `num_dropped` of the drawn ones came after their
    sequence's end. `limit` is why the batch was no larger, if it was small; `times` None means not measured.
    """

    num_tokens: int
    num_drawn: int
    limit: Loss
    device_seconds: float
    times: StepTimes | None = None
    num_recomputed: int = 0
    num_dropped: int = 0
    num_padding_tokens: int = 0
    skips_tail: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTotals:
    """Seconds since the start: all that are booked, the ideal ones, and those of each loss; the group's optimum.

    `skipped_head_seconds` are a gain: the optimum counts the output head for every token, prompt tokens skip it, and
    in some steps what lies before it, too.
    """

    accounted_seconds: float = 0.0
    ideal_seconds: float = 0.0
    skipped_head_seconds: float = 0.0
    loss_seconds: dict[Loss, float] = field(default_factory=dict)
    optimal_tokens_per_second: float | None = None


class LossLedger:
    """Starts without requests at `now`. Every total only ever grows; `now` is a monotonic clock's.

    Totals may be read from another thread than the engine's, as a metrics endpoint does.
    """

    def __init__(self, optimum: Optimum, *, dense_batch: int, now: float) -> None:
        self._optimum = optimum
        self._dense_batch = dense_batch
        self._dense_seconds = 1 / optimum.dense_tokens_per_second
        self._num_full = 1
        self._started = now
        self._booked_until = now
        self._is_idle = True
        self._ideal = 0.0
        self._skipped_head = 0.0
        self._losses = dict.fromkeys(Loss, 0.0)
        self._debts = dict.fromkeys(Loss, 0.0)
        self._lock = threading.Lock()

    def request_came(self, now: float) -> None:
        """There is something to do from now on."""
        with self._lock:
            if self._is_idle:
                self._charge(Loss.NO_REQUESTS, self._seconds_to(now))
                self._is_idle = False

    def requests_ended(self, now: float) -> None:
        """No request is open and no step in flight. What passed since the last step ended was nobody's computation."""
        with self._lock:
            if not self._is_idle:
                self._charge(Loss.CPU_GAP, self._seconds_to(now))
                self._is_idle = True

    def step_ended(self, step: FinishedStep, now: float) -> None:
        """The step's result is here: book the time since the last event."""
        with self._lock:
            self._charge(Loss.CPU_GAP, self._seconds_to(now) - step.device_seconds)
            self._book_device(step)

    def totals(self, now: float) -> LossTotals:
        """Everything booked so far; while there are no requests, the time up to now."""
        with self._lock:
            if self._is_idle:
                self._charge(Loss.NO_REQUESTS, self._seconds_to(now))
            return LossTotals(
                accounted_seconds=self._booked_until - self._started,
                ideal_seconds=self._ideal,
                skipped_head_seconds=self._skipped_head,
                loss_seconds=dict(self._losses),
                optimal_tokens_per_second=self._optimum.tokens_per_second,
            )

    def _book_device(self, step: FinishedStep) -> None:
        useful_tokens = max(0, step.num_tokens - step.num_recomputed - step.num_dropped)
        useful_drawn = min(useful_tokens, step.num_drawn - step.num_dropped)
        ideal_token = 1 / self._optimum.tokens_per_second
        self._ideal += useful_tokens * ideal_token
        self._skipped_head += (useful_tokens - useful_drawn) * self._head_share(step) * ideal_token
        times = step.times
        if times is None:
            return
        named = times.gemm_seconds + times.attention_seconds + times.exposed_network_seconds
        self._charge(Loss.EXPOSED_ATTENTION, times.attention_seconds)
        self._charge(Loss.EXPOSED_NETWORK, times.exposed_network_seconds)
        self._charge(Loss.OTHER_OPERATIONS, step.device_seconds - named)
        self._book_gemm(step, times.gemm_seconds, useful_tokens, useful_drawn)

    def _book_gemm(self, step: FinishedStep, seconds: float, useful_tokens: int, useful_drawn: int) -> None:
        num_rows = step.num_tokens + step.num_padding_tokens
        head = self._head_share(step)
        work = _work(num_rows, step.num_drawn, head)
        if work == 0:
            return
        per_token = seconds / work
        useful_work = _work(useful_tokens, useful_drawn, head)
        discarded_work = _work(step.num_tokens - useful_tokens, step.num_drawn - useful_drawn, head)
        self._charge(Loss.PADDING, per_token * _work(step.num_padding_tokens, 0, head))
        self._charge(Loss.DISCARDED_TOKENS, per_token * discarded_work)
        small = 0.0
        if num_rows >= FULL_SHARE * self._dense_batch:
            self._learn_dense(per_token)
        else:
            small = useful_work * max(0.0, per_token - self._dense_seconds)
            self._charge(step.limit, small)
        below = useful_work * (per_token - 1 / self._optimum.tokens_per_second) - small
        self._charge(Loss.GEMM_BELOW_PEAK, below)

    def _learn_dense(self, per_token: float) -> None:
        self._num_full = min(self._num_full + 1, DENSE_MEAN_STEPS)
        self._dense_seconds += (per_token - self._dense_seconds) / self._num_full

    def _head_share(self, step: FinishedStep) -> float:
        """The share of a token's work that only drawn ones were."""
        return self._optimum.head_share + (self._optimum.tail_share if step.skips_tail else 0.0)

    def _seconds_to(self, now: float) -> float:
        """The time since the last event; `now` is the last event from here on."""
        seconds = max(0.0, now - self._booked_until)  # another thread may have read its clock before the last event
        self._booked_until += seconds
        return seconds

    def _charge(self, loss: Loss, seconds: float) -> None:
        """Add to a loss. What would make it shrink (a clock's jitter) is kept and set against its next charges."""
        seconds += self._debts[loss]
        self._debts[loss] = min(0.0, seconds)
        self._losses[loss] += max(0.0, seconds)


def _work(num_tokens: int, num_drawn: int, head: float) -> float:
    """In tokens that meet every active parameter; `head` is the share that only drawn ones meet."""
    return num_tokens * (1 - head) + num_drawn * head
