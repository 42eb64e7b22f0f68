"""`ModelRunner`: one `Batch` to one step on the device: inputs, forward pass, logits, drawn tokens, token pool.

It owns the row tables and nothing else; a step is launched without waiting for the device, so the next one can be
launched before this one's tokens are on the host. It knows no sequences, no prefixes, no other ranks.

Legend: S sequences of the step, K of them drawn from, T tokens, D decodes, P prefills.
"""

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch, IntArray
from engine.config import EngineConfig, PipelineMode
from engine.kv_cache import KVCache
from engine.models.decoder import Decoder
from engine.pending_step import PendingStep, StepClock
from engine.pipeline.lanes import lanes_for
from engine.pipeline.nano_batch import Cut
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.plan_choice import PlanChoice
from engine.pipeline.plan_set import PlanSet
from engine.pipeline.stopwatch import Cost, Stopwatch
from engine.sampler import Drawn, sample
from engine.sampling_table import Int64s, SamplingPlan, SamplingTable
from engine.staging import HostArray, stage
from engine.step_inputs import StepInputs
from engine.token_pool import TokenPool


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
    ) -> None:
        self._model = model
        self.pipeline = pipeline
        self._lanes = lanes_for(device, overlaps=config.pipeline is PipelineMode.OVERLAP)
        self.plans = PlanChoice(pipeline.sequential, plans)
        self._kv_cache = kv_cache
        self.device = device
        self._returns_logprobs = returns_logprobs
        self._pool = TokenPool(
            max_sequences=config.max_sequences,
            max_model_len=config.max_model_len,
            max_blocks_per_sequence=config.max_blocks_per_sequence,
            device=device,
        )
        self._sampling = SamplingTable(config.max_sequences, config.model.vocab_size, config.model.eos_token_ids)
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
        num_prefills = batch.num_tokens - batch.num_decodes
        name, schedule = self.plans.of(batch.num_decodes, num_prefills)
        cut = schedule.cut.scaled(batch.num_decodes, num_prefills)
        for admission in batch.admissions:
            self._sampling.admit(admission.row, admission.sampling, admission.num_prompt_tokens)
        lengths = (batch.starts + batch.counts).astype(np.int64)
        sampled_rows = batch.rows[batch.sampled].astype(np.int64)
        plan = self._sampling.plan(sampled_rows, lengths[batch.sampled], self._returns_logprobs)
        arrays = {**_update_arrays(batch), **_step_arrays(batch, lengths, cut), **plan.arrays}
        staged = stage(arrays, self.device)
        self._pool.write_tokens(staged["new_row"], staged["new_position"], staged["new_token"])
        self._pool.write_blocks(staged["block_row"], staged["block_index"], staged["block_id"])
        drawn = None
        if len(batch.rows):
            hidden_TE = self.pipeline.run(self._step_inputs(batch, lengths, staged), schedule, self._lanes, stopwatch)
            if len(batch.sampled):
                drawn = self._draw(hidden_TE, plan, staged, stopwatch)
        clock.stop()
        times = stopwatch.times() if self.device.type == "cpu" else None
        return PendingStep(batch.step, plan, drawn, clock, self._copies, plan_name=name, times=times)

    def _draw(self, hidden_TE: Tensor, plan: SamplingPlan, staged: dict[str, Tensor], stopwatch: Stopwatch) -> Drawn:
        """Draw the sampled tokens; chunks that do not end a prompt have only filled the cache."""
        started = stopwatch.now()
        shard_KR = self._model.lm_head.shard(self._model.norm(hidden_TE[staged["sampled_token"]]))
        multiplied = stopwatch.spent(Cost.GEMM, started)
        logits_KV = self._model.lm_head.join(shard_KR)
        stopwatch.gathered(multiplied, self._model.lm_head.all_gather)
        drawn = sample(logits_KV, plan, staged, self._pool)
        self._pool.write_tokens(staged["sampled_row"], staged["sampled_position"], drawn.token_ids)
        return drawn

    def _step_inputs(self, batch: Batch, lengths: Int64s, staged: dict[str, Tensor]) -> StepInputs:
        """What the layers read; everything per token is gathered on the device."""
        block_size = self._kv_cache.block_size
        num_decodes = batch.num_decodes
        rows_S, lengths_S = staged["row"], staged["length"]
        decode_width = -(-int(lengths[:num_decodes].max(initial=0)) // block_size)
        prefill_width = -(-int(lengths[num_decodes:].max(initial=0)) // block_size)
        return StepInputs(
            tokens=self._pool.read_tokens(staged["token_row"], staged["token_position"]),
            positions=staged["token_position"],
            slots=self._pool.slots(staged["token_row"], staged["token_position"], block_size),
            decode_block_tables=self._pool.tables(rows_S[:num_decodes], decode_width),
            decode_lengths=lengths_S[:num_decodes],
            prefill_block_tables=self._pool.tables(rows_S[num_decodes:], prefill_width),
            num_decodes=num_decodes,
            max_decode_length=int(lengths[:num_decodes].max(initial=0)),
            prefill_chunk_sizes=tuple(batch.counts[num_decodes:].tolist()),
            prefill_context_lengths=tuple(lengths[num_decodes:].tolist()),
            kv_cache=self._kv_cache,
        )


def _update_arrays(batch: Batch) -> dict[str, HostArray]:
    """The tokens of admitted rows and the changed entries of block tables, one flat array per column."""
    sizes = [len(admission.token_ids) for admission in batch.admissions]
    tokens = [admission.token_ids for admission in batch.admissions]
    updates = batch.block_updates.reshape(-1, 3).astype(np.int64)
    return {
        "new_row": np.repeat(np.array([admission.row for admission in batch.admissions], dtype=np.int64), sizes),
        "new_position": _ranges(np.zeros(len(sizes), dtype=np.int64), np.array(sizes, dtype=np.int64)),
        "new_token": np.concatenate(tokens).astype(np.int64) if tokens else np.empty(0, dtype=np.int64),
        "block_row": updates[:, 0],
        "block_index": updates[:, 1],
        "block_id": updates[:, 2],
    }


def _step_arrays(batch: Batch, lengths: Int64s, cut: Cut) -> dict[str, HostArray]:
    """Rows and positions of the T tokens, the S sequences and the K draws; `cut` is the order of hidden states."""
    counts = batch.counts.astype(np.int64)
    ends = counts.cumsum()
    return {
        "token_row": np.repeat(batch.rows.astype(np.int64), counts),
        "token_position": _ranges(batch.starts, counts),
        "row": batch.rows.astype(np.int64),
        "length": lengths,
        "sampled_token": cut.positions_of(ends[batch.sampled] - 1),
        "sampled_row": batch.rows[batch.sampled].astype(np.int64),
        "sampled_position": lengths[batch.sampled],
    }


def _ranges(starts: Int64s | IntArray, counts: Int64s) -> Int64s:
    """starts[0], starts[0] + 1, ... (counts[0] of them), starts[1], ...: one flat int64 array."""
    shifts = starts.astype(np.int64) - (counts.cumsum() - counts)
    return np.arange(counts.sum(), dtype=np.int64) + np.repeat(shifts, counts)
