"""`OfflineBenchmark`: all requests at once through one engine in this process, and how near it came to the optimum.

Tensor parallelism is 1 and nothing but the engine is measured: no HTTP, no text, no Ray. The GEMM peak that the result
is compared with is measured in the same run, before the model is loaded and after it is gone; the better one counts,
so that a moment of noise cannot flatter the engine.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config import EngineConfig
from engine.errors import ConfigError, EngineDeadError
from engine.event_loop import new_event_loop
from engine.gemm_peak import METHOD, GemmPeak, measure_gemm_peak
from engine.inline_executor import InlineExecutor
from engine.llm_engine import LLMEngine
from engine.loss_waterfall import LossWaterfall
from engine.optimum import active_parameters, optimal_tokens_per_second
from engine.request import Request, RequestId, SamplingParams, TokenOutput
from engine.stats import EngineStats
from engine.workloads.synthetic_prompt import SyntheticPrompts
from engine.workloads.workload import Workload

Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineResult:
    """What one run achieved. `num_cached_prompt_tokens` were found in the prefix cache and not computed.

    `percent_of_optimum` counts all tokens in and out; the `waterfall` those computed, which for every request is one
    less: its last token is drawn and never an input.
    """

    config: EngineConfig
    workload: Workload
    seconds: float
    num_steps: int
    num_batch_tokens: int
    num_cached_prompt_tokens: int
    num_preemptions: int
    num_discarded_tokens: int
    device_seconds: float
    schedule_seconds: float
    num_steps_by_plan: dict[str, int]
    hidden_network_seconds: float
    gemm_peak: GemmPeak
    waterfall: LossWaterfall

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt tokens taken in, cached ones included."""
        return self.workload.num_prompt_tokens / self.seconds

    @property
    def output_tokens_per_second(self) -> float:
        """Tokens generated."""
        return self.workload.num_output_tokens / self.seconds

    @property
    def computed_tokens_per_second(self) -> float:
        """Tokens in and out, without the prompt tokens that the prefix cache saved."""
        cached = self.num_cached_prompt_tokens / self.seconds
        return self.prompt_tokens_per_second + self.output_tokens_per_second - cached

    @property
    def optimal_tokens_per_second(self) -> float:
        """What the measured GEMM peak would allow."""
        peak = self.gemm_peak
        return optimal_tokens_per_second(peak.flops_per_second, self.config.model, peak.wide_flops_per_second)

    @property
    def percent_of_optimum(self) -> float:
        """Computed tokens per second as a percentage of the optimum."""
        return 100 * self.computed_tokens_per_second / self.optimal_tokens_per_second

    def to_json(self) -> dict[str, Any]:
        """The result as plain values; durations in seconds."""
        config, peak = self.config, self.gemm_peak
        return {
            "model": str(config.checkpoint),
            "architecture": str(config.model.architecture),
            "active_parameters": active_parameters(config.model),
            "dtype": config.number_format.value,
            "kv_cache_dtype": config.cache_format.value,
            "device": config.device.value,
            "num_threads": config.threads_per_rank,
            "max_batch_tokens": config.max_batch_tokens,
            "max_sequences": config.max_sequences,
            "pipeline": config.pipeline.value,
            "workload": self.workload.description,
            "num_requests": len(self.workload.requests),
            "num_prompt_tokens": self.workload.num_prompt_tokens,
            "num_cached_prompt_tokens": self.num_cached_prompt_tokens,
            "num_output_tokens": self.workload.num_output_tokens,
            "seconds": self.seconds,
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
            "output_tokens_per_second": self.output_tokens_per_second,
            "computed_tokens_per_second": self.computed_tokens_per_second,
            "num_steps": self.num_steps,
            "mean_batch_tokens": self.num_batch_tokens / max(1, self.num_steps),
            "num_preemptions": self.num_preemptions,
            "num_discarded_tokens": self.num_discarded_tokens,
            "device_seconds": self.device_seconds,
            "schedule_seconds": self.schedule_seconds,
            "gemm_peak_flops_per_second": peak.flops_per_second,
            "wide_gemm_peak_flops_per_second": peak.wide_flops_per_second,
            "gemm_peak_shape": list(peak.shape),
            "gemm_peak_method": METHOD,
            "gemm_flops_per_second_by_shape": {
                "x".join(map(str, shape)): rate for shape, rate in peak.by_shape.items()
            },
            "optimal_tokens_per_second": self.optimal_tokens_per_second,
            "percent_of_optimum": self.percent_of_optimum,
            "num_steps_by_plan": self.num_steps_by_plan,
            "hidden_network_seconds": self.hidden_network_seconds,
            "loss_waterfall": self.waterfall.to_json(),
        }


class OfflineBenchmark:
    """Runs `workload` on the engine that `config` describes. `progress(n)` is told of every n tokens generated."""

    def __init__(
        self, config: EngineConfig, workload: Workload, *, seed: int = 0, progress: Progress = lambda count: None
    ) -> None:
        if workload.longest > config.max_model_len:
            raise ConfigError(
                f"The longest request has {workload.longest} tokens, more than the {config.max_model_len} of "
                "max_model_len: divide the lengths (--length-divisor) or choose another workload."
            )
        self._config = config
        self._workload = workload
        self._prompts = SyntheticPrompts(vocab_size=config.model.vocab_size, seed=seed)
        self._progress = progress

    def run(self) -> OfflineResult:
        """Load, warm up, measure. Raises `ConfigError` for what cannot start and `EngineDeadError`."""
        with asyncio.Runner(loop_factory=new_event_loop) as runner:  # uvloop: 1 to 2 % of a small model's rate
            config, seconds, counted, waterfall, peaks = runner.run(self._run())
        peak = max(peaks, key=lambda peak: peak.flops_per_second)
        return OfflineResult(
            config=config,
            workload=self._workload,
            seconds=seconds,
            num_steps=counted.num_steps,
            num_batch_tokens=counted.num_batch_tokens,
            num_cached_prompt_tokens=counted.num_cached_prompt_tokens,
            num_preemptions=counted.num_preemptions,
            num_discarded_tokens=counted.num_discarded_tokens,
            device_seconds=counted.device_seconds,
            schedule_seconds=counted.schedule_seconds,
            num_steps_by_plan=counted.num_steps_by_plan,
            hidden_network_seconds=counted.hidden_network_seconds,
            gemm_peak=peak,
            waterfall=waterfall.with_optimum(
                optimal_tokens_per_second(peak.flops_per_second, self._config.model, peak.wide_flops_per_second)
            ),
        )

    async def _run(self) -> tuple[EngineConfig, float, EngineStats, LossWaterfall, Sequence[GemmPeak]]:
        """What ran, seconds, counters at the end, the losses of those seconds against the peak that the rank measured,
        and the peaks before and after.
        """
        executor = InlineExecutor(self._config)
        engine = LLMEngine(self._config, executor)
        try:
            await engine.start()
            peaks = [executor.measure(measure_gemm_peak)]
            requests = [self._request(index) for index in range(len(self._workload.requests))]
            sink = _CountingSink(len(requests), self._progress)
            before = engine.stats()
            started = time.perf_counter()
            for request in requests:
                engine.submit(request, sink)
            await sink.all_finished
            seconds, counted = time.perf_counter() - started, engine.stats()
            waterfall = LossWaterfall.between(before, counted)
            assert waterfall is not None, "a worker measures its GEMM peak, and every workload has a request"
            peaks.append(executor.measure(measure_gemm_peak))
            return executor.measure(lambda config: config), seconds, counted, waterfall, peaks
        finally:
            await engine.close()

    def _request(self, index: int) -> Request:
        length = self._workload.requests[index].num_output_tokens
        return Request(
            request_id=RequestId(f"offline-{index}"),
            prompt_token_ids=tuple(self._prompts.token_ids(self._workload, index)),
            sampling=SamplingParams(max_tokens=length, ignore_eos=True, temperature=0.0),
        )


class _CountingSink:
    """Counts tokens and resolves `all_finished` when the last request has ended."""

    def __init__(self, num_requests: int, progress: Progress) -> None:
        self._num_open = num_requests
        self._progress = progress
        self.all_finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def put(self, outputs: list[TokenOutput]) -> None:
        self._progress(sum(len(output.token_ids) for output in outputs))
        self._num_open -= sum(output.finish_reason is not None for output in outputs)
        if self._num_open == 0 and not self.all_finished.done():
            self.all_finished.set_result(None)

    def fail(self, error: EngineDeadError) -> None:
        if not self.all_finished.done():
            self.all_finished.set_exception(error)
