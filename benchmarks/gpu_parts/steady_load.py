"""`SteadyLoad`: an engine under the load that it would have had for long, measured over a window.

As many requests are open as it can run, from the first moment in all stages of their lives: one that is to have
generated k tokens has a prompt that is k longer and k fewer tokens to go. Whoever ends is followed by a whole request.
So nothing of the window is a start or an end, and the window can be short.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.config import EngineConfig
from engine.errors import EngineDeadError
from engine.llm_engine import LLMEngine
from engine.loss_waterfall import LossWaterfall
from engine.request import Request, RequestId, SamplingParams, TokenOutput
from engine.stats import EngineStats

_POLL_SECONDS = 0.02
_SETTLING_STEPS, _LEAST_STEPS = 3, 5
_MOST_WAITING = 30.0  # seconds beyond those wanted, for steps that take very long
_STEP_PARTS = (
    "num_timed_steps", "num_padding_tokens", "num_preemptions", "num_discarded_tokens", "device_seconds",
    "gemm_seconds", "attention_seconds", "exposed_network_seconds", "schedule_seconds", "busy_seconds",
)  # fmt: skip
_GOLDEN = 0.6180339887498949  # multiples of it are spread evenly, however many of them run


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyResult:
    """What the window held. `num_tokens` are those computed and not lost: of prompts, and drawn ones fed back.
    `step_parts` are counters of `EngineStats`, by their names.
    """

    seconds: float
    num_tokens: int
    num_output_tokens: int
    num_steps: int
    mean_running: float
    fill_seconds: float
    num_steps_by_plan: dict[str, int]
    step_parts: dict[str, float]
    waterfall: LossWaterfall | None

    @property
    def tokens_per_second(self) -> float:
        """In and out."""
        return self.num_tokens / self.seconds


class SteadyLoad:
    """Requests of `num_input` and `num_output` tokens; `num_open` at any time."""

    def __init__(self, engine: LLMEngine, config: EngineConfig, num_input: int, num_output: int, num_open: int) -> None:
        self._engine = engine
        self._vocab_size = config.model.vocab_size
        self._num_input = num_input
        self._num_output = num_output
        self._num_open = num_open
        self._generator = np.random.default_rng(0)
        self._open: set[RequestId] = set()
        self._num_made = 0
        self._fill_seconds = 0.0
        self._is_over = False
        self._failure: EngineDeadError | None = None
        self._label = f"steady-{time.monotonic_ns()}"

    async def measure(
        self, window_seconds: float, most_fill_seconds: float, warm_seconds: float = 1.0
    ) -> SteadyResult | None:
        """Fill, count, and end. None where filling takes too long. Raises `EngineDeadError`."""
        try:
            if not await self.fill(most_fill_seconds):
                return None
            return await self.window(window_seconds, warm_seconds)
        finally:
            await self.end()

    async def fill(self, most_seconds: float) -> bool:
        """Wait until all that can run are running; whether that took no longer. Raises `EngineDeadError`."""
        started = time.perf_counter()
        for index in range(self._num_open):
            self._submit(int(index * _GOLDEN % 1 * self._num_output))
        is_filled = await self._until(self._is_filled, most_seconds)
        self._fill_seconds = time.perf_counter() - started
        return is_filled

    async def end(self) -> None:
        """Abort all requests, and wait until they are gone."""
        self._is_over = True
        for request_id in list(self._open):
            self._engine.abort(request_id)
        await self._until(lambda: self._engine.stats().num_running == 0, 5.0)

    async def window(self, seconds: float, warm_seconds: float = 1.0) -> SteadyResult:
        """Count for so long, and some steps, after `warm_seconds` in which what has just changed settles. May be called
        again.
        """
        await self._while_running(warm_seconds, _SETTLING_STEPS)
        before, begun = self._engine.stats(), time.perf_counter()
        running = await self._while_running(seconds, _LEAST_STEPS)
        after, ended = self._engine.stats(), time.perf_counter()
        plans = {plan: count - before.num_steps_by_plan.get(plan, 0) for plan, count in after.num_steps_by_plan.items()}
        return SteadyResult(
            seconds=ended - begun,
            num_tokens=_computed(after) - _computed(before),
            num_output_tokens=after.num_generated_tokens - before.num_generated_tokens,
            num_steps=after.num_steps - before.num_steps,
            mean_running=sum(running) / max(1, len(running)),
            fill_seconds=self._fill_seconds,
            num_steps_by_plan={plan: count for plan, count in plans.items() if count},
            step_parts={name: getattr(after, name) - getattr(before, name) for name in _STEP_PARTS},
            waterfall=LossWaterfall.between(before, after),
        )

    async def _while_running(self, seconds: float, least_steps: int) -> list[int]:
        """Let the engine go on for so long, and so many steps; how many requests were running, again and again."""
        begun, last = time.perf_counter(), self._engine.stats().num_steps + least_steps
        running: list[int] = []
        while time.perf_counter() - begun < seconds or self._engine.stats().num_steps < last:
            if time.perf_counter() - begun > seconds + _MOST_WAITING:
                break
            await asyncio.sleep(_POLL_SECONDS)
            self._check()
            running.append(self._engine.stats().num_running)
        return running

    def _is_filled(self) -> bool:
        """Nobody waits, or the cache is as full as it gets: some have ended and been followed."""
        stats = self._engine.stats()
        return stats.num_running > 0 and (stats.num_waiting == 0 or self._num_made > self._num_open + 8)

    async def _until(self, is_so: Callable[[], bool], seconds: float) -> bool:
        deadline = time.perf_counter() + seconds
        while not is_so():
            if time.perf_counter() > deadline:
                return False
            self._check()
            await asyncio.sleep(_POLL_SECONDS)
        return True

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _submit(self, num_generated: int) -> None:
        size = self._num_input + num_generated
        request = Request(
            request_id=RequestId(f"{self._label}-{self._num_made}"),
            prompt_token_ids=tuple(self._generator.integers(0, self._vocab_size, size).tolist()),
            sampling=SamplingParams(
                max_tokens=max(1, self._num_output - num_generated), ignore_eos=True, temperature=0.0
            ),
        )  # fmt: skip
        self._num_made += 1
        self._open.add(request.request_id)
        self._engine.submit(request, self)

    def put(self, outputs: list[TokenOutput]) -> None:
        """The engine's side: whoever has ended is followed."""
        for output in outputs:
            if output.finish_reason is not None:
                self._open.discard(output.request_id)
                if not self._is_over:
                    self._submit(0)

    def fail(self, error: EngineDeadError) -> None:
        """The engine's side: it has died."""
        self._failure = error


def _computed(stats: EngineStats) -> int:
    """Step by step, where the counter of prompt tokens takes whole prompts at once."""
    return stats.num_batch_tokens - stats.num_discarded_tokens
