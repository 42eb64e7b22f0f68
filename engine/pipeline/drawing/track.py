"""`Track`: one row of a drawing: events of one lane of one rank that do not overlap.

A lane needs one track, except where several of its events were recorded in flight together, as collectives may be.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.pipeline.schedule import Lane
from engine.pipeline.timeline import TimelineEvent

_EPSILON = 1e-9


@dataclass(frozen=True, slots=True)
class Track:
    """`number` counts the tracks of a lane; events are sorted by start."""

    rank: int
    lane: Lane
    number: int
    events: tuple[TimelineEvent, ...]

    @property
    def name(self) -> str:
        """The lane, and which of its tracks where it is not the first."""
        return self.lane.value if self.number == 0 else f"{self.lane.value} {self.number + 1}"


def tracks(events: Sequence[TimelineEvent]) -> list[Track]:
    """The rows that show all events, rank by rank, in the order of the lanes; an event takes the first one free."""
    rows: dict[tuple[int, Lane], list[list[TimelineEvent]]] = {}
    for event in sorted(events, key=lambda event: (event.start, event.end)):
        mine = rows.setdefault((event.rank, event.lane), [])
        free = next((row for row in mine if row[-1].end <= event.start + _EPSILON), None)
        if free is None:
            mine.append(free := [])
        free.append(event)
    return [
        Track(rank, lane, number, tuple(row))
        for rank in sorted({rank for rank, _ in rows})
        for lane in Lane
        for number, row in enumerate(rows.get((rank, lane), []))
    ]
