"""`ModelRunner`: one `Batch` to one step on the device: inputs, forward pass, logits, drawn tokens, token pool.

A step is launched without waiting for the device, so the next one can be launched before this one's tokens are on the
host. It knows no sequences, no prefixes, no other ranks.
"""

import torch
from torch import Tensor

from engine.batch import Batch
from engine.config import EngineConfig, PipelineMode
from engine.input_preparation import InputPreparation, PreparedStep
from engine.kv_cache import KVCache
from engine.layers.attention import DecodeAttention
from engine.models.decoder import Decoder
from engine.padded_steps import PaddedSteps
from engine.pending_step import PendingStep
from engine.pipeline.capture import Captures
from engine.pipeline.lanes import lanes_for
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.plan_choice import PlanChoice
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
        self._lanes = lanes_for(device, overlaps=config.pipeline is PipelineMode.OVERLAP)
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
        self._lanes = lanes_for(self.device, overlaps=overlaps)

    def pad_steps(self, captures: Captures | None) -> None:
        """From now on run the steps of the sequential schedule at a few fixed sizes, as CUDA graphs if they can be.

        The layers must be computed by `engine.kernels.gpu`. Raises `CaptureError` where a layer waits for the device;
        steps then go on as before.
        """
        padded = PaddedSteps(self._config, self._model, self.pipeline, self._kv_cache, self._preparation.pool)
        if captures is not None:
            padded.capture(captures)
        self.padded = padded

    @torch.inference_mode()
    def launch(self, batch: Batch) -> PendingStep:
        """Start one step; on a CPU it is over on return."""
        clock = StepClock(self.device)
        stopwatch = Stopwatch(rank=self._rank, records_events=batch.is_recorded)
        name, schedule = self.plans.of(batch.num_decodes, batch.num_tokens - batch.num_decodes)
        prepared, hidden_TE, num_padding_tokens = self._run(batch, schedule, stopwatch)
        drawn = None
        if hidden_TE is not None and len(batch.sampled):
            drawn = self._draw(hidden_TE, prepared, stopwatch)
        clock.stop()
        times = stopwatch.times() if self.device.type == "cpu" else None
        return PendingStep(
            batch.step,
            prepared.plan,
            drawn,
            clock,
            self._copies,
            plan_name=name,
            times=times,
            num_padding_tokens=num_padding_tokens,
            recorded=self._recorded(batch, name, schedule, stopwatch) if batch.is_recorded else None,
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

    def _run(self, batch: Batch, schedule: Schedule, stopwatch: Stopwatch) -> tuple[PreparedStep, Tensor | None, int]:
        """The prepared step, its hidden states (None without tokens), and how many rows more were computed."""
        # A graph is one launch: what runs in it when, only the operations one by one can tell.
        if self.padded is not None and not batch.is_recorded and schedule == self.pipeline.sequential:
            bucket = self.padded.bucket_of(batch)
            if bucket is not None:
                prepared = self._preparation.prepare_padded(batch, schedule.cut, self.padded.inputs, bucket)
                hidden_TE = self.padded.run(bucket)[: batch.num_tokens]
                return prepared, hidden_TE, bucket.num_tokens - batch.num_tokens
        prepared = self._preparation.prepare(batch, schedule.cut)
        if prepared.inputs is None:
            return prepared, None, 0
        return prepared, self.pipeline.run(prepared.inputs, schedule, self._lanes, stopwatch), 0

    def _draw(self, hidden_TE: Tensor, prepared: PreparedStep, stopwatch: Stopwatch) -> Drawn:
        """Draw the sampled tokens; chunks that do not end a prompt have only filled the cache."""
        started = stopwatch.now()
        hidden_KE = hidden_TE if prepared.sampled_tokens is None else hidden_TE[prepared.sampled_tokens]
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
