"""`StandInRunner`: the `ModelRunner` of a rank without the layers, and with a vocabulary of 64, so that only what it
does around the model takes time: staging a batch, its inputs, drawing and the tokens' way back into the pool.
"""

import time
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from step_parts.setting import BLOCK_SIZE, MAX_MODEL_LEN
from torch import Tensor

from engine import Batch, DType, EngineConfig, StepOutput
from engine.kv_cache import KVCache
from engine.model_config import Architecture
from engine.model_runner import ModelRunner
from engine.models import build_model
from engine.pending_step import PendingStep
from engine.pipeline.lanes import Lanes
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.schedule import Schedule
from engine.pipeline.stopwatch import Stopwatch
from engine.random_checkpoint import sized_config
from engine.step_inputs import StepInputs
from engine.tensor_parallel import TensorParallel

_HIDDEN_SIZE: Final = 64
_VOCAB_SIZE: Final = 64


class _NoLayers(Pipeline):
    """Hidden states of any batch at once; remembers when they were asked for."""

    asked_at = 0.0

    def run(
        self,
        step: StepInputs,
        schedule: Schedule,
        lanes: Lanes,
        stopwatch: Stopwatch,
        wanted_K: Tensor | None = None,
    ) -> Tensor:
        self.asked_at = time.perf_counter()
        return self._zeros(len(step.tokens))

    def _zeros(self, num_tokens: int) -> Tensor:
        return torch.zeros(1, _HIDDEN_SIZE).expand(num_tokens, _HIDDEN_SIZE)


@dataclass(slots=True, kw_only=True)
class RankTimes:
    """Seconds per step: before the layers, after them (head, drawing, pool), and until the tokens are an output."""

    inputs: list[float] = field(default_factory=list)
    drawing: list[float] = field(default_factory=list)
    output: list[float] = field(default_factory=list)


class StandInRunner:
    """One rank's runner on the CPU, of one thread."""

    def __init__(self, config: EngineConfig) -> None:
        torch.set_num_threads(1)
        shape = sized_config(
            Architecture.LLAMA,
            hidden_size=_HIDDEN_SIZE,
            intermediate_size=64,
            num_layers=1,
            num_heads=4,
            num_kv_heads=4,
            vocab_size=_VOCAB_SIZE,
            max_position_embeddings=MAX_MODEL_LEN,
            dtype=DType.FLOAT32,
        )
        device = torch.device("cpu")
        model = build_model(shape, TensorParallel(), torch.float32, device)
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        self._layers = _NoLayers(model, _HIDDEN_SIZE)
        cache = KVCache(
            num_layers=1, num_blocks=1, num_kv_heads=4, block_size=BLOCK_SIZE, head_dim=16, dtype=torch.float32
        )
        self._runner = ModelRunner(replace(config, model=shape, tensor_parallel=1), model, self._layers, cache, device)
        self.times = RankTimes()

    def launch(self, batch: Batch) -> PendingStep:
        """What a rank does when a batch arrives."""
        started = time.perf_counter()
        pending = self._runner.launch(batch)
        ended = time.perf_counter()
        self.times.inputs.append(self._layers.asked_at - started)
        self.times.drawing.append(ended - self._layers.asked_at)
        return pending

    def output(self, pending: PendingStep) -> StepOutput:
        """What it does when the tokens are there."""
        started = time.perf_counter()
        output = pending.wait()
        self.times.output.append(time.perf_counter() - started)
        return output


def measure_rank(config: EngineConfig, batches: list[Batch], num_timed: int) -> RankTimes:
    """Times of the last `num_timed` batches; those before them fill the tables."""
    runner = StandInRunner(config)
    for batch in batches:
        output = runner.output(runner.launch(batch))
        assert len(output.token_ids) == len(batch.sampled)
    times = runner.times
    return RankTimes(
        inputs=times.inputs[-num_timed:], drawing=times.drawing[-num_timed:], output=times.output[-num_timed:]
    )
