"""`Window`: the part of a step that a drawing shows. Layers repeat, so a few from the middle say it all."""

from dataclasses import dataclass, replace

from engine.pipeline.timeline import Timeline, TimelineEvent


@dataclass(frozen=True, slots=True)
class Window:
    """From `start` to `end`, in seconds since the step began; `begins` tells the (layer, start) pairs in between."""

    start: float
    end: float
    begins: tuple[tuple[int, float], ...] = ()

    @property
    def seconds(self) -> float:
        """How much time it shows."""
        return self.end - self.start

    @classmethod
    def whole(cls, timeline: Timeline) -> "Window":
        """All of the step."""
        return cls(0.0, timeline.seconds, _begins(timeline))

    @classmethod
    def steady(cls, timeline: Timeline, num_layers: int) -> "Window":
        """So many layers from the middle: from the moment one begins to the moment the one after them does.

        All of the step where it has no more layers than that and two.
        """
        begins = _begins(timeline)
        if len(begins) < num_layers + 2:
            return cls.whole(timeline)
        first = (len(begins) - num_layers) // 2
        return cls(begins[first][1], begins[first + num_layers][1], begins[first : first + num_layers])

    def events(self, timeline: Timeline) -> list[TimelineEvent]:
        """What runs inside, cut off at the borders, by start; what takes no time is left out."""
        cut = (
            replace(event, start=max(event.start, self.start), end=min(event.end, self.end))
            for event in timeline.events
            if event.end > event.start
        )
        return sorted((event for event in cut if event.end > event.start), key=lambda event: event.start)


def _begins(timeline: Timeline) -> tuple[tuple[int, float], ...]:
    """When the first event of each layer starts."""
    begins: dict[int, float] = {}
    for event in timeline.events:
        if event.layer is not None:
            begins[event.layer] = min(event.start, begins.get(event.layer, event.start))
    return tuple(sorted(begins.items()))
