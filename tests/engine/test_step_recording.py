"""`StepRecording`: which of the repetitions is kept, and how the ranks' events are put together."""

from typing import Any

import pytest

from engine.batch_shape import BatchShape
from engine.config import PipelineMode
from engine.local_group import LocalGroup
from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.schedule import Lane, Schedule, Step
from engine.pipeline.timeline import TimelineEvent
from engine.step_recording import RankRecording, StepRecording

SCHEDULE = Schedule(
    Cut((NanoBatch(4, 0), NanoBatch(0, 4))), {Lane.COMPUTE: (Step("o_proj", 0, 4), Step("o_proj", 4, 8))}
)


def steps(rank: int, seconds: float) -> tuple[TimelineEvent, ...]:
    """Two events of a step that takes so long; the batch has twice the tokens that the schedule was made for."""
    middle = seconds / 2
    kwargs: dict[str, Any] = {"operation": "o_proj", "lane": Lane.COMPUTE, "layer": 0, "rank": rank}
    return (
        TimelineEvent(start=0.0, end=middle, start_token=0, stop_token=8, **kwargs),
        TimelineEvent(start=middle, end=seconds, start_token=8, stop_token=16, **kwargs),
    )


class _Group(LocalGroup):
    """Two ranks that recorded three steps, of which rank 1 began each half a second late."""

    def __init__(self) -> None:
        pass

    def run(self, *_: Any, **__: Any) -> list[Any]:
        lengths = ((1.0, 5.0, 2.0), (1.0, 1.0, 3.0))
        return [
            RankRecording(
                "given",
                SCHEDULE,
                begins=(10.0 + rank / 2, 20.0 + rank / 2, 30.0 + rank / 2),
                events=tuple(steps(rank, seconds) for seconds in lengths[rank]),
                sequential_seconds=(4.0 + rank, 7.0, 9.0),
            )
            for rank in range(2)
        ]


def test_the_step_of_median_length_is_kept_on_one_clock() -> None:
    shape = BatchShape(num_decodes=8, num_prefills=8)
    recording = StepRecording.of(_Group(), shape, SCHEDULE, PipelineMode.OVERLAP, 3)
    # The steps end after 1.5 (rank 1), 5 (rank 0) and 3.5 (rank 1) seconds.
    assert recording.timeline.seconds == pytest.approx(3.5)
    assert [(event.rank, event.start) for event in recording.timeline.events] == [
        (0, 0.0),
        (0, 1.0),
        (1, 0.5),
        (1, 2.0),
    ]
    assert [event.nano_batch for event in recording.timeline.events] == [0, 1, 0, 1]
    assert recording.sequential_seconds == 7.0 and recording.speedup == pytest.approx(2.0)
    assert not recording.timeline.is_predicted
    assert "recorded: 3500 ms for the layers of a step, 2.00 times as fast" in recording.heading
