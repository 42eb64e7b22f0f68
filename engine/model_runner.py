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
from engine.models.decoder import Decoder
from engine.pending_step import PendingStep, StepClock
from engine.pipeline.lanes import lanes_for
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.plan_choice import PlanChoice
from engine.pipeline.plan_set import PlanSet
from engine.pipeline.stopwatch import Cost, Stopwatch
from engine.sampler import Drawn, sample


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
        returns_logprobs: bool = True,
        uses_gpu_kernels: bool = False,
    ) -> None:
        self._model = model
        self.pipeline = pipeline
        self._lanes = lanes_for(device, overlaps=config.pipeline is PipelineMode.OVERLAP)
        self.plans = PlanChoice(pipeline.sequential, plans)
        self.device = device
        self._preparation = InputPreparation(
            config, kv_cache, device, returns_logprobs=returns_logprobs, lengths_on_device=uses_gpu_kernels
        )
        self._copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def use(self, plans: PlanChoice, *, overlaps: bool) -> None:
        """Run the steps from now on by other plans; benchmarks compare modes on one model with it."""
        self.plans = plans
        self._lanes = lanes_for(self.device, overlaps=overlaps)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> PendingStep:
        """Start one step; on a CPU it is over on return."""
        clock = StepClock(self.device)
        stopwatch = Stopwatch()
        name, schedule = self.plans.of(batch.num_decodes, batch.num_tokens - batch.num_decodes)
        prepared = self._preparation.prepare(batch, schedule.cut)
        drawn = None
        if prepared.inputs is not None:
            hidden_TE = self.pipeline.run(prepared.inputs, schedule, self._lanes, stopwatch)
            if len(batch.sampled):
                drawn = self._draw(hidden_TE, prepared, stopwatch)
        clock.stop()
        times = stopwatch.times() if self.device.type == "cpu" else None
        return PendingStep(batch.step, prepared.plan, drawn, clock, self._copies, plan_name=name, times=times)

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
