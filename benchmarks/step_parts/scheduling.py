"""Scheduling by itself: the `Scheduler` over steady traffic, results one step late as in the engine, no engine around.

`compose` is the call that composes a step. `ends_and_arrivals` frees what sequences that ended held and queues those
that come; `tokens_back` appends a step's tokens to their sequences and registers the blocks that they complete as
prefixes. Everything that the three leave undone is done in no other place.
"""

import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from step_parts.setting import MAX_MODEL_LEN, VOCAB_SIZE, Setting
from step_parts.traffic import Traffic

from engine import Batch, FinishReason
from engine.block_manager import BlockManager
from engine.length_predictor import LengthPredictor
from engine.scheduler import ScheduledStep, Scheduler
from engine.sequence import Sequence, SequenceStatus


@dataclass(slots=True, kw_only=True)
class SchedulingTimes:
    """Seconds per step, and what was composed: all `batches`, of which the last `len(compose)` were timed."""

    compose: list[float] = field(default_factory=list)
    ends_and_arrivals: list[float] = field(default_factory=list)
    tokens_back: list[float] = field(default_factory=list)
    num_running: list[int] = field(default_factory=list)
    num_arrivals: int = 0
    cached_share: float = 0.0
    batches: list[Batch] = field(default_factory=list)

    @property
    def all_of_it(self) -> list[float]:
        """The three together."""
        return [sum(parts) for parts in zip(self.compose, self.ends_and_arrivals, self.tokens_back, strict=True)]


def measure_scheduling(setting: Setting, num_warm_up: int, num_steps: int) -> SchedulingTimes:
    """Times of `num_steps` steps after `num_warm_up` others."""
    run = _Run(setting, num_warm_up + num_steps)
    for step in range(num_warm_up + num_steps):
        run.step(is_timed=step >= num_warm_up)
    return run.finished()


class _Run:
    def __init__(self, setting: Setting, num_steps: int) -> None:
        config = setting.config
        blocks = BlockManager(setting.capacity.num_blocks, setting.capacity.block_size)
        self._scheduler = Scheduler(
            blocks,
            LengthPredictor(config.max_model_len),
            max_batch_tokens=config.max_batch_tokens,
            max_sequences=config.max_sequences,
        )
        traffic = Traffic(setting.num_running, vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN)
        standing = traffic.standing()
        coming = traffic.arrivals(num_steps * setting.num_running // 100 + 100)
        sequences = [Sequence(request, order, 0.0) for order, request in enumerate(standing + coming)]
        self._new, self._coming = sequences[: len(standing)], deque(sequences[len(standing) :])
        self._in_flight: deque[ScheduledStep] = deque()
        self._times = SchedulingTimes()

    def step(self, *, is_timed: bool) -> None:
        """Queue, compose, and take the tokens of the step before."""
        started = time.perf_counter()
        for sequence in self._new:
            self._scheduler.add(sequence)
        added = time.perf_counter()
        scheduled = self._scheduler.schedule(0.0)
        composed = time.perf_counter()
        if scheduled is not None:
            self._in_flight.append(scheduled)
        before = self._in_flight.popleft() if len(self._in_flight) > (scheduled is not None) else None
        tokens = [0] * (0 if before is None else len(before.sampled))
        resumed = time.perf_counter()
        if before is not None:
            self._scheduler.append(before, tokens)
        appended = time.perf_counter()
        ended = [] if before is None else _ended(before)
        ending = time.perf_counter()
        for sequence in ended:
            self._scheduler.finish(sequence, FinishReason.LENGTH)
        freed = time.perf_counter()
        self._new = [self._coming.popleft() for _ in ended]
        if scheduled is None:  # a few sequences can all be at their last token
            return
        times = self._times
        times.batches.append(scheduled.batch)
        if is_timed:
            times.compose.append(composed - added)
            times.ends_and_arrivals.append(added - started + freed - ending)
            times.tokens_back.append(appended - resumed)
            times.num_running.append(self._scheduler.num_running)
            times.num_arrivals += len(self._new)

    def finished(self) -> SchedulingTimes:
        scheduler = self._scheduler
        self._times.cached_share = scheduler.num_cached_prompt_tokens / scheduler.num_prompt_tokens
        return self._times


def _ended(step: ScheduledStep) -> list[Sequence]:
    return [
        sequence
        for sequence in step.sampled
        if sequence.status is not SequenceStatus.FINISHED
        and sequence.num_generated == sequence.request.sampling.max_tokens
    ]


def steady_batch(num_sequences: int) -> Batch:
    """A decode step without arrivals: every row computes one token, one in 16 takes a new block."""
    rows = np.arange(num_sequences, dtype=np.int32)
    return Batch(
        step=1,
        admissions=(),
        block_updates=np.stack([rows[::16], rows[::16], rows[::16]], axis=1),
        rows=rows,
        starts=rows + 100,
        counts=np.ones_like(rows),
        num_decodes=num_sequences,
        sampled=rows,
    )
