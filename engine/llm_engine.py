"""`LLMEngine`: the loop that schedules a step, has it executed, and delivers its tokens, one step ahead of the device.

Step n+1 is composed and sent while step n runs; when n's tokens arrive they are appended, ends are detected, blocks
freed and outputs delivered, and then n+2 is composed. All outputs of one step for one sink travel in one call, so
that an ingress with hundreds of streams gets one message per step. Knows token ids; not text, HTTP, Ray or torch.
"""

import asyncio
import gc
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from engine.batch import StepOutput
from engine.block_manager import BlockManager
from engine.config import EngineConfig
from engine.errors import EngineDeadError, RequestError
from engine.executor import CacheCapacity, Executor
from engine.finished_request import FinishedRequest
from engine.length_predictor import LengthPredictor
from engine.loss import Loss
from engine.loss_ledger import FinishedStep, LossLedger, LossTotals
from engine.optimum import Optimum
from engine.request import FinishReason, Request, RequestId, TokenOutput
from engine.request_limits import RequestLimits
from engine.scheduler import ScheduledStep, Scheduler
from engine.sequence import Sequence
from engine.stats import EngineStats
from engine.step_totals import StepTotals


class OutputSink(Protocol):
    """Receives the outputs of the requests submitted with it; called on the engine's event loop, must not block."""

    def put(self, outputs: list[TokenOutput]) -> None:
        """Everything that one step produced for this sink's requests."""
        ...

    def fail(self, error: EngineDeadError) -> None:
        """The engine died: no request of this sink will get another output."""
        ...


@dataclass(frozen=True, slots=True)
class _OpenRequest:
    sequence: Sequence
    sink: OutputSink
    stop_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class _StepInFlight:
    scheduled: ScheduledStep
    limit: Loss
    result: asyncio.Future[StepOutput]


class LLMEngine:
    """Serves requests with one executor. Create, `start`, then `submit` or `generate` from the same event loop.

    `on_finished` is told of every request that ends, on that loop; it must not block or raise.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        on_finished: Callable[[FinishedRequest], None] | None = None,
    ) -> None:
        self._config = config
        self._executor = executor
        self._on_finished = on_finished
        self._open: dict[RequestId, _OpenRequest] = {}
        self._wake = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._death: EngineDeadError | None = None
        self._num_submitted = 0
        self._steps = StepTotals()
        self._ledger: LossLedger | None = None
        self._num_generated_tokens = 0
        self._num_dropped_tokens = 0
        self._finished: Counter[str] = Counter()
        self._schedule_seconds = 0.0
        self._busy_seconds = 0.0
        self._busy_since: float | None = None
        self._queue_seconds = 0.0
        self._progress_at: float | None = None  # the last step's end, or the first request's arrival; None without any

    async def start(self) -> CacheCapacity:
        """Load the model, then serve; raises `ConfigError` for what cannot start."""
        self._capacity = await asyncio.to_thread(self._executor.start)
        self._blocks = BlockManager(
            self._capacity.num_blocks, self._capacity.block_size, prefix_caching=self._config.prefix_caching
        )
        self._scheduler = Scheduler(
            self._blocks,
            LengthPredictor(self._config.max_model_len),
            max_batch_tokens=self._config.max_batch_tokens,
            max_sequences=self._config.max_sequences,
        )
        self._limits = RequestLimits(
            vocab_size=self._config.model.vocab_size,
            max_model_len=self._config.max_model_len,
            cache_tokens=self._capacity.num_tokens,
        )
        optimum = Optimum.of(self._config, self._capacity)
        if optimum is not None:
            self._ledger = LossLedger(optimum, dense_batch=self._config.max_batch_tokens, now=time.monotonic())
        # What exists now stays: a collector that looked through all of it again would stop the loop for 0.1 s.
        gc.collect()
        gc.freeze()
        self._loop = asyncio.create_task(self._run(), name="engine step loop")
        return self._capacity

    def submit(self, request: Request, sink: OutputSink) -> None:
        """Queue a request; its outputs go to `sink`. Raises `RequestError` for one that can never run."""
        if self._death is not None:
            raise self._death
        if request.request_id in self._open:
            raise RequestError(f"Request id {request.request_id!r} is already being served.", "request_id")
        self._limits.check(request)
        sampling = request.sampling
        stop_token_ids = sampling.stop_token_ids
        if not sampling.ignore_eos:
            stop_token_ids |= self._config.model.eos_token_ids
        sequence = Sequence(request, self._num_submitted, time.monotonic())
        self._num_submitted += 1
        if self._progress_at is None:
            self._progress_at = sequence.arrived_at
        if self._ledger is not None:
            self._ledger.request_came(sequence.arrived_at)
        self._open[request.request_id] = _OpenRequest(sequence, sink, stop_token_ids)
        self._scheduler.add(sequence)
        self._wake.set()

    async def generate(self, request: Request) -> AsyncIterator[TokenOutput]:
        """The outputs of one request, in order; leaving the iteration early aborts it."""
        stream = _Stream()
        self.submit(request, stream)
        try:
            while True:
                output = await stream.get()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self.abort(request.request_id)

    def abort(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request now and free its blocks; unknown and finished ones are ignored.

        `reason` is STOP where the reader has found the end, by a stop string for example: that is an answer's length to
        learn from, a client that left is not.
        """
        open_request = self._open.get(request_id)
        if open_request is not None:
            sequence = open_request.sequence
            self._finish(sequence, reason)
            last = TokenOutput(
                request_id=request_id,
                token_ids=(),
                position=sequence.num_generated,
                finish_reason=reason,
            )
            open_request.sink.put([last])

    def stats(self) -> EngineStats:
        """A snapshot of the engine; cheap enough for every step."""
        scheduler, steps, progress_at = self._scheduler, self._steps, self._progress_at  # of one moment: threads read
        losses = LossTotals() if self._ledger is None else self._ledger.totals(time.monotonic())
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=self._blocks.num_blocks,
            num_used_blocks=self._blocks.num_used_blocks,
            num_cached_blocks=self._blocks.num_cached_blocks,
            block_size=self._blocks.block_size,
            num_steps=steps.num_steps,
            num_timed_steps=steps.num_timed_steps,
            num_batch_tokens=steps.num_batch_tokens,
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_cached_prompt_tokens=scheduler.num_cached_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_discarded_tokens=self._num_dropped_tokens + scheduler.num_recomputed_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_padding_tokens=steps.num_padding_tokens,
            num_finished=dict(self._finished),
            num_steps_by_plan=dict(steps.num_steps_by_plan),
            device_seconds=steps.device_seconds,
            gemm_seconds=steps.gemm_seconds,
            attention_seconds=steps.attention_seconds,
            exposed_network_seconds=steps.exposed_network_seconds,
            network_seconds=steps.network_seconds,
            hidden_network_seconds=steps.hidden_network_seconds,
            schedule_seconds=self._schedule_seconds,
            busy_seconds=self._busy_until_now(),
            queue_seconds=self._queue_seconds,
            seconds_since_step=0.0 if progress_at is None else time.monotonic() - progress_at,
            accounted_seconds=losses.accounted_seconds,
            ideal_seconds=losses.ideal_seconds,
            skipped_head_seconds=losses.skipped_head_seconds,
            loss_seconds=losses.loss_seconds,
            optimal_tokens_per_second=losses.optimal_tokens_per_second,
        )

    @property
    def death(self) -> EngineDeadError | None:
        """Why no request is served any more; None while the engine lives."""
        return self._death

    async def close(self) -> None:
        """Stop the loop and the ranks; requests still open fail. Idempotent."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)
            self._die(EngineDeadError("The engine was closed."))
            gc.unfreeze()
        await asyncio.to_thread(self._executor.close)

    async def _run(self) -> None:
        in_flight: deque[_StepInFlight] = deque()
        try:
            while True:
                scheduled = self._schedule()
                if scheduled is not None:
                    result = asyncio.ensure_future(self._executor.execute(scheduled.batch))
                    in_flight.append(_StepInFlight(scheduled, self._batch_limit(), result))
                    self._busy_since = self._busy_since or time.perf_counter()
                if len(in_flight) > (0 if scheduled is None else 1):
                    step = in_flight.popleft()
                    self._deliver(step, await step.result)
                elif scheduled is None:
                    self._busy_seconds, self._busy_since = self._busy_until_now(), None
                    if not self._open:
                        self._progress_at = None
                        if self._ledger is not None:
                            self._ledger.requests_ended(time.monotonic())
                    self._wake.clear()
                    await self._wake.wait()
        except Exception as error:
            cause = error if isinstance(error, EngineDeadError) else EngineDeadError(f"A step failed: {error!r}")
            cause.__cause__ = error if cause is not error else error.__cause__
            self._die(cause)
        finally:
            for step in in_flight:
                step.result.cancel()

    def _busy_until_now(self) -> float:
        return self._busy_seconds + (0.0 if self._busy_since is None else time.perf_counter() - self._busy_since)

    def _schedule(self) -> ScheduledStep | None:
        started = time.perf_counter()
        scheduled = self._scheduler.schedule(time.monotonic())
        self._schedule_seconds += time.perf_counter() - started
        return scheduled

    def _batch_limit(self) -> Loss:
        """Why the batch just composed has no more tokens, if it has fewer than it could."""
        if self._scheduler.num_waiting == 0:
            return Loss.TRAFFIC_LIMITED_BATCH
        if self._scheduler.num_running == self._config.max_sequences:
            return Loss.SEQUENCE_LIMITED_BATCH
        return Loss.KV_LIMITED_BATCH

    def _deliver(self, step: _StepInFlight, output: StepOutput) -> None:
        arrived = self._progress_at = time.monotonic()
        self._steps.add(step.scheduled.batch, output)
        num_dropped = self._emit(step.scheduled, output)
        self._num_dropped_tokens += num_dropped
        if self._ledger is not None:
            batch = step.scheduled.batch
            finished = FinishedStep(
                num_tokens=batch.num_tokens,
                num_drawn=len(batch.sampled),
                limit=step.limit,
                device_seconds=output.device_seconds,
                times=output.times,
                num_recomputed=step.scheduled.num_recomputed,
                num_dropped=num_dropped,
                num_padding_tokens=output.num_padding_tokens,
                skips_tail=output.skips_tail,
            )
            self._ledger.step_ended(finished, arrived)

    def _emit(self, step: ScheduledStep, output: StepOutput) -> int:
        """Append and hand out the drawn tokens; returns how many came too late, after their sequence's end."""
        num_dropped = 0
        token_ids: list[int] = output.token_ids.tolist()
        self._scheduler.append(step, token_ids)
        by_sink: dict[int, tuple[OutputSink, list[TokenOutput]]] = {}
        outputs: list[TokenOutput] = []
        last_sink: OutputSink | None = None
        for index, (sequence, token_id) in enumerate(zip(step.sampled, token_ids, strict=True)):
            request_id = sequence.request.request_id
            open_request = self._open.get(request_id)
            if open_request is None or open_request.sequence is not sequence:
                num_dropped += 1  # it ended, by a stop or an abort, while this token was being drawn
                continue
            logprob = output.logprobs[index] if output.logprobs is not None else None
            num_generated = sequence.num_generated
            if num_generated == 1 and sequence.scheduled_at is not None:
                self._queue_seconds += sequence.scheduled_at - sequence.arrived_at
                sequence.first_token_at = self._progress_at
            token = TokenOutput(  # by position: naming the fields takes twice as long
                request_id,
                (token_id,),
                num_generated - 1,
                self._end_by(open_request, token_id, num_generated),
                None if logprob is None else (logprob,),
                sequence.num_cached_tokens,
            )
            sink = open_request.sink
            if sink is not last_sink:  # mostly there is one, of the only ingress
                last_sink, outputs = by_sink.setdefault(id(sink), (sink, []))
            outputs.append(token)
        self._num_generated_tokens += len(token_ids) - num_dropped
        for sink, outputs in by_sink.values():
            sink.put(outputs)
        return num_dropped

    def _end_by(self, open_request: _OpenRequest, token_id: int, num_generated: int) -> FinishReason | None:
        """End a request that its newest token ends, and say why; None where it goes on."""
        sampling = open_request.sequence.request.sampling
        if token_id in open_request.stop_token_ids and num_generated >= sampling.min_tokens:
            reason = FinishReason.STOP
        elif num_generated == sampling.max_tokens:
            reason = FinishReason.LENGTH
        else:
            return None
        self._finish(open_request.sequence, reason)
        return reason

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        del self._open[sequence.request.request_id]
        self._scheduler.finish(sequence, reason)
        self._finished[reason.value] += 1
        if self._on_finished is not None:
            self._on_finished(FinishedRequest.of(sequence, reason, time.monotonic()))
        self._wake.set()

    def _die(self, error: EngineDeadError) -> None:
        self._death = error
        self._busy_seconds, self._busy_since = self._busy_until_now(), None
        ended = list(self._open.values())
        self._open.clear()
        if self._on_finished is not None:
            for open_request in ended:
                self._on_finished(FinishedRequest.of(open_request.sequence, None, time.monotonic()))
        sinks = {id(open_request.sink): open_request.sink for open_request in ended}
        for sink in sinks.values():
            sink.fail(error)


class _Stream:
    """The sink behind `LLMEngine.generate`."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[TokenOutput | EngineDeadError] = asyncio.Queue()

    def put(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            self._queue.put_nowait(output)

    def fail(self, error: EngineDeadError) -> None:
        self._queue.put_nowait(error)

    async def get(self) -> TokenOutput:
        item = await self._queue.get()
        if isinstance(item, EngineDeadError):
            raise item
        return item
