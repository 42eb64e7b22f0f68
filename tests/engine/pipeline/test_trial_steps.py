"""A trial times what would be served: padded steps where steps are padded, graphs where they can be captured."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.batch_shape import BatchShape
from engine.config import EngineConfig
from engine.model_config import Architecture
from engine.pipeline.capture import CaptureError
from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.schedule import Schedule
from engine.pipeline.split_schedule import split_schedule
from engine.pipeline.synthetic_step import synthetic_batch, synthetic_cache, synthetic_step
from engine.pipeline.trial import Contestant, Trial
from engine.tensor_parallel import TensorParallel
from tests.engine.gpu_case import DEVICE, config_of, random_model

pytest.importorskip("triton")

NUM_ROUNDS = 1
SHAPE = BatchShape(num_decodes=3, num_prefills=9, decode_context=8, prefill_context=4)


class Replays:
    """Stands in for `Captures`: every run is computed once, and counted when it is replayed."""

    def __init__(self, *, refused: tuple[int, ...] = (), by: Callable[[str], Exception] = CaptureError) -> None:
        self.refused = refused
        self.by = by
        self.asked: list[str] = []
        self.replayed: list[str] = []

    def capture(self, run: Callable[[], Any]) -> Any:
        name = run.func.__name__  # type: ignore[attr-defined]
        self.asked.append(name)
        if len(self.asked) - 1 in self.refused:
            raise self.by("It waits.\nAnd more.")
        result = run()

        def replay() -> Any:
            self.replayed.append(name)
            return result

        return SimpleNamespace(replay=replay)


def trial_of(config: EngineConfig, *, kernels: bool) -> tuple[Trial, Pipeline, list[Contestant]]:
    pipeline = Pipeline(random_model(config, kernels=kernels), config.model.hidden_size)
    halves = split_schedule(pipeline.graph, Cut((NanoBatch(1, 4), NanoBatch(2, 5))))
    contestants = [Contestant(pipeline.sequential, False), Contestant(halves, True)]
    return Trial(config, pipeline, TensorParallel()), pipeline, contestants


def test_plans_and_the_baseline_are_the_graphs_that_would_be_served() -> None:
    trial, _, contestants = trial_of(config_of(Architecture.LLAMA), kernels=True)
    captures = Replays()
    trial._captures = captures  # type: ignore[assignment]
    timings = trial.run(contestants, SHAPE, 0.0, NUM_ROUNDS)
    assert [len(timing.rounds) for timing in timings] == [NUM_ROUNDS] * 2
    assert captures.asked == ["_run_whole", "_run_cut"]
    assert captures.replayed == ["_run_whole", "_run_cut"] * (NUM_ROUNDS + 1)


class _OutOfResourcesError(Exception):
    """As Triton's, of a kernel that asks for more than there is."""


@pytest.mark.parametrize("refusal", [CaptureError, RuntimeError, _OutOfResourcesError])
def test_a_plan_that_would_not_be_served_gains_nothing(
    refusal: Callable[[str], Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither one that waits for the device, or that torch cannot capture, nor one that has no place for the batch."""
    trial, pipeline, contestants = trial_of(config_of(Architecture.LLAMA), kernels=True)
    captures = Replays(refused=(1,), by=refusal)
    trial._captures = captures  # type: ignore[assignment]
    alone = split_schedule(pipeline.graph, Cut((NanoBatch(3, 0), NanoBatch(0, 9))))
    trial.run([*contestants, Contestant(alone, True)], SHAPE, 0.0, NUM_ROUNDS)
    assert set(captures.replayed) == {"_run_whole"} and len(captures.replayed) == 3 * (NUM_ROUNDS + 1)
    waiting, alone_told = [record.message for record in caplog.records]
    assert waiting == "A plan would not be run: It waits." and "a place for one mix alone" in alone_told


@pytest.mark.parametrize("why", ["it waits", "torch fails", "plain torch", "too large"])
def test_where_steps_are_launched_they_are_timed_so(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(Architecture.LLAMA, max_batch_tokens=8 if why == "too large" else 40)
    trial, pipeline, contestants = trial_of(config, kernels=why != "plain torch")
    captures = Replays(refused=(0,), by=RuntimeError if why == "torch fails" else CaptureError)
    trial._captures = captures  # type: ignore[assignment]
    launched: list[Schedule] = []
    run = pipeline.run

    def noted(*arguments: Any) -> Any:
        launched.append(arguments[1])
        return run(*arguments)

    monkeypatch.setattr(pipeline, "run", noted)
    trial.run(contestants, SHAPE, 0.0, NUM_ROUNDS)
    assert launched == [each.schedule for each in contestants] * (NUM_ROUNDS + 1)
    assert captures.replayed == [] and len(captures.asked) == (why in ("it waits", "torch fails"))


def test_the_baseline_computes_no_more_behind_the_last_attention_than_it_would_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Plans compute all rows, so a baseline that did would have them win where they lose."""
    trial, pipeline, contestants = trial_of(config_of(Architecture.LLAMA), kernels=False)
    assert trial._captures is None
    num_rows: list[int] = []
    run = pipeline.run

    def noted(*arguments: Any) -> Any:
        hidden = run(*arguments)
        num_rows.append(len(hidden))
        return hidden

    monkeypatch.setattr(pipeline, "run", noted)
    trial.run(contestants, SHAPE, 0.0, NUM_ROUNDS)
    drawn_from = SHAPE.num_decodes + 2  # the prefill tokens of this context are two chunks
    assert num_rows == [drawn_from, SHAPE.num_tokens] * (NUM_ROUNDS + 1)


def test_a_batch_for_trials_is_the_step_that_layers_are_measured_on() -> None:
    config = config_of(Architecture.LLAMA)
    cache = synthetic_cache(config, 200, DEVICE)
    batch, pool = synthetic_batch(SHAPE, config, cache, DEVICE)
    step = synthetic_step(SHAPE, config.max_model_len, cache, DEVICE)
    assert (batch.num_decodes, batch.num_tokens) == (step.num_decodes, len(step.tokens))
    lengths = (batch.starts + batch.counts).tolist()
    assert lengths == [*step.decode_lengths.tolist(), *step.prefill_context_lengths]
    assert tuple(batch.counts[3:].tolist()) == step.prefill_chunk_sizes
    assert torch.equal(pool.block_tables[:3, : step.decode_block_tables.shape[1]], step.decode_block_tables)
    assert torch.equal(pool.block_tables[3:, : step.prefill_block_tables.shape[1]], step.prefill_block_tables)
    assert len(set(pool.tokens.flatten().tolist())) > 50
