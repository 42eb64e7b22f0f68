"""A trial times what would be served: padded steps where steps are padded, graphs where they can be captured."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from engine.batch_shape import BatchShape
from engine.config import EngineConfig
from engine.model_config import Architecture
from engine.pipeline.capture import CaptureError
from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.padded_layers import PaddedLayers
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.split_schedule import split_schedule
from engine.pipeline.trial import MIN_ROUNDS, Contestant, Trial
from engine.tensor_parallel import TensorParallel
from tests.engine.gpu_case import config_of, random_model

pytest.importorskip("triton")

SHAPE = BatchShape(num_decodes=3, num_prefills=9, decode_context=8, prefill_context=4)


class Replays:
    """Stands in for `Captures`: every run is computed once, and counted when it is replayed."""

    def __init__(self, *, refused: tuple[int, ...] = ()) -> None:
        self.refused = refused
        self.asked: list[str] = []
        self.replayed: list[str] = []

    def capture(self, run: Callable[[], Any]) -> Any:
        name = run.func.__name__  # type: ignore[attr-defined]
        self.asked.append(name)
        if len(self.asked) - 1 in self.refused:
            raise CaptureError("It waits.")
        result = run()

        class Graph:
            def replay(_: object) -> Any:
                self.replayed.append(name)
                return result

        return Graph()


def trial_of(config: EngineConfig, *, kernels: bool) -> tuple[Trial, Pipeline, list[Contestant]]:
    pipeline = Pipeline(random_model(config, kernels=kernels), config.model.hidden_size)
    halves = split_schedule(pipeline.graph, Cut((NanoBatch(1, 4), NanoBatch(2, 5))))
    contestants = [Contestant(pipeline.sequential, False), Contestant(halves, True)]
    return Trial(config, pipeline, TensorParallel()), pipeline, contestants


def test_plans_and_the_baseline_are_the_graphs_that_would_be_served() -> None:
    trial, _, contestants = trial_of(config_of(Architecture.LLAMA), kernels=True)
    captures = Replays()
    trial._captures = captures  # type: ignore[assignment]
    timings = trial.run(contestants, SHAPE, 0.0)
    assert [len(timing.rounds) for timing in timings] == [MIN_ROUNDS] * 2
    assert captures.asked == ["_run_whole", "_run_cut"]
    assert captures.replayed == ["_run_whole", "_run_cut"] * (MIN_ROUNDS + 1)


def test_a_plan_that_would_not_be_served_gains_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Neither one that waits for the device nor one that has no place for the batch."""
    trial, pipeline, contestants = trial_of(config_of(Architecture.LLAMA), kernels=True)
    captures = Replays(refused=(1,))
    trial._captures = captures  # type: ignore[assignment]
    alone = split_schedule(pipeline.graph, Cut((NanoBatch(3, 0), NanoBatch(0, 9))))
    trial.run([*contestants, Contestant(alone, True)], SHAPE, 0.0)
    assert set(captures.replayed) == {"_run_whole"} and len(captures.replayed) == 3 * (MIN_ROUNDS + 1)
    assert [record.message.partition(" has")[0] for record in caplog.records] == [
        "A plan would not be run: It waits.",
        "A plan would not be run: a nano-batch of 3 decodes and 0 prefill tokens, beside others with the other kind,",
    ]


@pytest.mark.parametrize("why", ["it waits", "plain torch", "too large"])
def test_where_steps_are_launched_they_are_timed_so(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(Architecture.LLAMA, max_batch_tokens=8 if why == "too large" else 40)
    trial, pipeline, contestants = trial_of(config, kernels=why != "plain torch")
    captures = Replays(refused=(0,))
    trial._captures = captures  # type: ignore[assignment]
    launched = []
    run = pipeline.run
    monkeypatch.setattr(pipeline, "run", lambda *args: launched.append(args[1]) or run(*args))
    trial.run(contestants, SHAPE, 0.0)
    assert launched == [each.schedule for each in contestants] * (MIN_ROUNDS + 1)
    assert captures.replayed == [] and len(captures.asked) == (why == "it waits")


def test_a_trial_runs_the_batch_that_it_was_given() -> None:
    """Every row of the contexts is read where it lies, and as many rows are padded as a server would."""
    config = replace(config_of(Architecture.LLAMA), max_sequences=3)
    trial, pipeline, contestants = trial_of(config, kernels=True)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        run = PaddedLayers._run_whole
        patch.setattr(PaddedLayers, "_run_whole", lambda self, bucket: seen.append(bucket) or run(self, bucket))
        trial.run(contestants[:1], SHAPE, 0.0)
    assert {bucket.num_tokens for bucket in seen} == {16}
