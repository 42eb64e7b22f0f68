"""A recorded step: the middle layers are kept, ranks are on one clock, and recording changes no token."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from engine.batch import Admission, Batch
from engine.config import EngineConfig
from engine.model_config import Architecture, DType, ModelConfig
from engine.pipeline.schedule import Lane
from engine.pipeline.timeline import TimelineEvent
from engine.random_checkpoint import sized_config, write_random_checkpoint
from engine.recorded_step import KEPT_LAYERS, RecordedStep, joined, middle_layers
from engine.request import SamplingParams
from engine.step_picture import draw_recorded_step
from engine.worker import Worker


def layer_event(layer: int | None, start: float = 0.0) -> TimelineEvent:
    return TimelineEvent(operation="qkv_proj", lane=Lane.COMPUTE, start=start, end=start + 1, layer=layer)


def test_of_many_layers_those_in_the_middle_are_kept() -> None:
    few = [layer_event(None), *map(layer_event, range(KEPT_LAYERS))]
    assert middle_layers(few) == tuple(few)
    many = [layer_event(None), *(layer_event(layer) for layer in range(80) for _ in range(3))]
    assert [event.layer for event in middle_layers(many)] == [38] * 3 + [39] * 3 + [40] * 3 + [41] * 3


def test_ranks_are_laid_side_by_side() -> None:
    def rank(number: int, began: float) -> RecordedStep:
        event = replace(layer_event(0), rank=number)
        return RecordedStep(
            rank=number, step=7, plan="p", num_tokens=1, num_decodes=1, began=began, seconds=1.0, events=(event,)
        )

    timeline = joined([rank(0, 100.5), rank(1, 100.0)], "t")
    assert [(event.rank, event.start, event.end) for event in timeline.events] == [(0, 0.5, 1.5), (1, 0.0, 1.0)]
    assert "step 7: 1 token (1 decodes), 1000 ms, plan p" in draw_recorded_step([rank(0, 0.0)], "t")


def batches() -> list[Batch]:
    """A prompt of five tokens, then three decodes."""
    sampling = SamplingParams(temperature=0, max_tokens=4)
    admission = Admission(row=0, token_ids=np.arange(1, 6, dtype=np.int32), num_prompt_tokens=5, sampling=sampling)
    none = np.empty((0, 3), np.int32)

    def numbers(*values: int) -> np.ndarray:
        return np.array(values, np.int32)

    first = Batch(
        step=0,
        admissions=(admission,),
        block_updates=np.array([[0, 0, 0]], np.int32),
        rows=numbers(0),
        starts=numbers(0),
        counts=numbers(5),
        num_decodes=0,
        sampled=numbers(0),
    )
    decodes = [
        replace(
            first,
            step=1 + i,
            admissions=(),
            block_updates=none,
            starts=numbers(5 + i),
            counts=numbers(1),
            num_decodes=1,
        )
        for i in range(3)
    ]
    return [first, *decodes]


def test_a_step_that_is_recorded_draws_the_same_tokens(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "tiny", sized_config(Architecture.LLAMA))
    config = EngineConfig(
        model=ModelConfig.from_checkpoint(tmp_path / "tiny"),
        checkpoint=tmp_path / "tiny",
        dtype=DType.FLOAT32,
        max_model_len=64,
        max_batch_tokens=16,
        max_sequences=2,
        num_blocks=4,
        num_threads=1,
        plan_seconds=0,
    )
    tokens = []
    for records in (False, True):
        worker = Worker(config)
        worker.start()
        steps = [worker.execute(replace(batch, is_recorded=records)) for batch in batches()]
        tokens.append([step.wait().token_ids.tolist() for step in steps])
        recorded = [step.recorded for step in steps]
        worker.close()
    assert tokens[0] == tokens[1]
    assert all(step is not None for step in recorded)
    first, second = recorded[0], recorded[1]
    assert first is not None and second is not None
    assert (first.num_tokens, first.num_decodes, second.num_tokens, second.num_decodes) == (5, 0, 1, 1)
    assert {event.layer for event in second.events} == set(range(config.model.num_layers))
    assert second.began > first.began
    assert 0 < max(event.end for event in second.events) == second.seconds
