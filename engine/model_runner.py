"""`ModelRunner`: one `Batch` to one step on the device: inputs, forward pass, logits, drawn tokens, token pool.

A step is launched without waiting for the device, so the next one can be launched before this one's tokens are on the
host. It knows no sequences, no prefixes, no other ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import Batch, StepTimes
from engine.config import EngineConfig, PipelineMode
from engine.device_times import DeviceTimes
from engine.input_preparation import InputPreparation, PreparedStep
from engine.kv_cache import KVCache
from engine.layers.attention import DecodeAttention
from engine.models.decoder import Decoder
from engine.pending_step import PendingStep
from engine.pipeline.capture import Captures
from engine.pipeline.lanes import lanes_for
from engine.pipeline.padded_layers import PaddedLayers
from engine.pipeline.padded_steps import PaddedSteps
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.plan_choice import SEQUENTIAL, PlanChoice
from engine.pipeline.plan_set import PlanSet
from engine.pipeline.schedule import Schedule
from engine.pipeline.stopwatch import Cost, Stopwatch
from engine.recorded_step import RecordedStep, in_nano_batch, middle_layers
from engine.sampler import Drawn, sample
from engine.step_clock import StepClock


class ModelRunner:
    """Runs batches in the order of the `launch` calls."""

    def __init__(
        self,
        config: EngineConfig,
        model: Decoder,
        pipeline: Pipeline,
        kv_cache: KVCache,
        device: torch.device,
        plans: PlanSet | None = None,
        *,
        rank: int = 0,
        returns_logprobs: bool = True,
        uses_gpu_kernels: bool = False,
    ) -> None:
        self._config = config
        self._rank = rank
        self._model = model
        self._kv_cache = kv_cache
        self.padded: PaddedSteps | None = None
        self.pipeline = pipeline
        self._overlaps = config.pipeline is PipelineMode.OVERLAP
        self._lanes = lanes_for(device, overlaps=self._overlaps)
        # On a GPU: what shares out the time of a step, once it has been measured.
        self.device_times: DeviceTimes | None = None
        self.plans = PlanChoice(pipeline.sequential, plans)
        self.device = device
        self._preparation = InputPreparation(
            config,
            kv_cache,
            device,
            returns_logprobs=returns_logprobs,
            lengths_on_device=uses_gpu_kernels,
            orders_decodes=any(
                isinstance(module, DecodeAttention) and module.compiled is not None for module in model.modules()
            ),
        )
        self._copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def use(self, plans: PlanChoice, *, overlaps: bool) -> None:
        """Run the steps from now on by other plans; benchmarks compare modes on one model with it."""
        self.plans = plans
        self._overlaps = overlaps
        self._lanes = lanes_for(self.device, overlaps=overlaps)
        if self.padded is not None:
            self.padded.serve(plans, self._lanes)

    def pad_steps(self, captures: Captures | None) -> None:
        """From now on run steps at a few fixed sizes, as CUDA graphs if they can be: all sizes by the sequential
        schedule, and those of batches that have a plan by that one.

        The layers must be computed by `engine.kernels.gpu`. Raises `CaptureError` where a layer waits for the device;
        steps then go on as before.
        """
        layers = PaddedLayers(self._config, self.pipeline, self._kv_cache, self._preparation.pool)
        padded = PaddedSteps(layers, self.pipeline.sequential, self._config.max_batch_tokens, captures)
        padded.serve(self.plans, self._lanes)
        self.padded = padded

    @torch.inference_mode()
    def launch(self, batch: Batch) -> PendingStep:
        """Start one step; on a CPU it is over on return."""
        clock = StepClock(self.device)
        stopwatch = Stopwatch(rank=self._rank, records_events=batch.is_recorded)
        ran = self._run(batch, stopwatch, clock)
        drawn = None
        if ran.drawn_from is not None and len(batch.sampled):
            drawn = self._draw(ran.drawn_from, ran.prepared, stopwatch)
        clock.stop()
        times: StepTimes | Callable[[float], StepTimes] | None = None
        if self.device_times is not None:
            times = self.device_times.of_step(batch, ran.schedule, ran.num_padding_tokens, self._overlaps)
        elif self.device.type == "cpu":
            times = stopwatch.times()
        return PendingStep(
            batch.step,
            ran.prepared.plan,
            drawn,
            clock,
            self._copies,
            plan_name=ran.plan,
            times=times,
            num_padding_tokens=ran.num_padding_tokens,
            skips_tail=ran.skips_tail,
            recorded=self._recorded(batch, ran.plan, ran.schedule, stopwatch) if batch.is_recorded else None,
        )

    def _recorded(self, batch: Batch, plan: str, schedule: Schedule, stopwatch: Stopwatch) -> RecordedStep:
        """The step that has just run."""
        cut = schedule.cut.scaled(batch.num_decodes, batch.num_tokens - batch.num_decodes)
        events = stopwatch.events or []
        return RecordedStep(
            rank=self._rank,
            step=batch.step,
            plan=plan,
            num_tokens=batch.num_tokens,
            num_decodes=batch.num_decodes,
            began=stopwatch.began,
            seconds=max((event.end for event in events), default=0.0),
            events=tuple(in_nano_batch(event, cut) for event in middle_layers(events)),
        )

    def _run(self, batch: Batch, stopwatch: Stopwatch, clock: StepClock) -> "_Ran":
        """Compute its hidden states."""
        name, schedule = self.plans.of(batch.num_decodes, batch.num_tokens - batch.num_decodes)
        # A graph is one launch: what runs in it when, only the operations one by one can tell.
        padded = None if self.padded is None or batch.is_recorded else self.padded.of(batch, schedule)
        if self.padded is not None and padded is not None:
            bucket = padded.step.bucket
            prepared = self._preparation.prepare_padded(
                batch, padded.dealt, self.padded.inputs, bucket, begin=clock.start
            )
            hidden_TE, sampled = padded.step.run(), prepared.sampled_tokens
            return _Ran(
                plan=name if padded.schedule == schedule else SEQUENTIAL,
                schedule=padded.schedule,
                prepared=prepared,
                drawn_from=hidden_TE[: batch.num_tokens] if sampled is None else hidden_TE[sampled],
                num_padding_tokens=bucket.num_tokens - batch.num_tokens,
            )
        prepared = self._preparation.prepare(batch, schedule.cut, begin=clock.start)
        if prepared.inputs is None:
            return _Ran(plan=name, schedule=schedule, prepared=prepared)
        wanted_K = prepared.sampled_tokens
        hidden = self.pipeline.run(prepared.inputs, schedule, self._lanes, stopwatch, wanted_K)
        skips_tail = len(hidden) < batch.num_tokens
        if wanted_K is not None and not skips_tail:
            hidden = hidden[wanted_K]
        return _Ran(plan=name, schedule=schedule, prepared=prepared, drawn_from=hidden, skips_tail=skips_tail)

    def _draw(self, hidden_KE: Tensor, prepared: PreparedStep, stopwatch: Stopwatch) -> Drawn:
        """Draw the sampled tokens; chunks that do not end a prompt have only filled the cache."""
        started = stopwatch.now()
        shard_KR = self._model.lm_head.shard(self._model.norm(hidden_KE))
        multiplied = stopwatch.spent(Cost.GEMM, started)
        logits_KV = self._model.lm_head.join(shard_KR)
        stopwatch.gathered(multiplied, self._model.lm_head.all_gather)
        best, draw = self._model.lm_head.best, self._model.lm_head.draw
        if draw is not None and prepared.plan.only_draws:
            drawn = Drawn(token_ids=draw(logits_KV, prepared.plan, prepared.sections))
        elif best is not None and not prepared.plan.arrays:  # all that every row asks for is its best token
            drawn = Drawn(token_ids=best(logits_KV)[0])
        else:
            drawn = sample(logits_KV, prepared.plan, prepared.sections, self._preparation.pool)
        self._preparation.drawn(prepared, drawn.token_ids)
        return drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ran:
    """A step by `plan`, that is by `schedule`: hidden states [K, E] of the rows to draw from (None without tokens).

    So many rows were padding; `skips_tail`, where the others were not computed behind the last attention.
    """

    plan: str
    schedule: Schedule
    prepared: PreparedStep
    drawn_from: Tensor | None = None
    num_padding_tokens: int = 0
    skips_tail: bool = False
