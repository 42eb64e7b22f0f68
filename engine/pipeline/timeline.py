"""`Timeline`: when each nano-operation of a step ran, or is predicted to run, on which lane of which rank."""

from collections.abc import Iterable
from dataclasses import dataclass

from engine.pipeline.schedule import ALL_UNITS, Lane


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineEvent:
    """A nano-operation, from `start` to `end` in seconds since the step began.

    `layer` is None outside the layers (embedding, head, sampling), where `start_token` and `stop_token` span the batch.
    `share` is in tenths of the execution units, as in a schedule.
    A gap in which the compute lane waits for another is no event; it is what lies between two of them.
    """

    operation: str
    lane: Lane
    start: float
    end: float
    layer: int | None = None
    start_token: int = 0
    stop_token: int = 0
    nano_batch: int = 0
    rank: int = 0
    share: int = ALL_UNITS


@dataclass(frozen=True, slots=True)
class Timeline:
    """The events of one step; `title` says what of (model, batch, plan), `is_predicted` whether anything ran."""

    title: str
    events: tuple[TimelineEvent, ...]
    is_predicted: bool

    @property
    def seconds(self) -> float:
        """From the start of the step to the end of its last event."""
        return max((event.end for event in self.events), default=0.0)

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """The lanes that have events, in the order compute, memory, network."""
        used = {event.lane for event in self.events}
        return tuple(lane for lane in Lane if lane in used)

    def busy_seconds(self, lane: Lane, rank: int = 0) -> float:
        """Time in which the lane of this rank has an event in flight; those in flight together count once."""
        return union_seconds(
            (event.start, event.end) for event in self.events if (event.lane, event.rank) == (lane, rank)
        )


def union_seconds(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of (start, end) intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
