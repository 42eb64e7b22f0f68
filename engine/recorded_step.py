"""`RecordedStep`: a step of a serving rank with what ran when on its lanes; told only where a batch asks for it.

Ranks of one machine read the same clock, so what they saw of a step can be laid side by side. Of a deep model only
layers from the middle are kept: they repeat, and that is what a drawing shows.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.pipeline.nano_batch import Cut
from engine.pipeline.timeline import Timeline, TimelineEvent

# The two in the middle, which are drawn, and their neighbours: these may still run when those begin.
KEPT_LAYERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedStep:
    """What one rank saw of a step: of which size, by which plan; `began` by the machine's clock, the rest since then.

    `seconds` is the time to the end of the last event, of those that were not kept, too.
    """

    rank: int
    step: int
    plan: str
    num_tokens: int
    num_decodes: int
    began: float
    seconds: float
    events: tuple[TimelineEvent, ...]

    @property
    def heading(self) -> str:
        """How much ran how, in a line."""
        tokens = f"{self.num_tokens:,} token{'' if self.num_tokens == 1 else 's'} ({self.num_decodes:,} decodes)"
        return f"step {self.step:,}: {tokens}, {1e3 * self.seconds:.4g} ms, plan {self.plan}"


def middle_layers(events: Sequence[TimelineEvent]) -> tuple[TimelineEvent, ...]:
    """The events of `KEPT_LAYERS` layers from the middle; all of them where there are no more layers."""
    layers = sorted({event.layer for event in events if event.layer is not None})
    if len(layers) <= KEPT_LAYERS:
        return tuple(events)
    first = (len(layers) - KEPT_LAYERS) // 2
    kept = layers[first : first + KEPT_LAYERS]
    return tuple(event for event in events if event.layer in kept)


def in_nano_batch(event: TimelineEvent, cut: Cut) -> TimelineEvent:
    """The event with the nano-batch that its tokens begin in."""
    return replace(event, nano_batch=max(0, bisect_right(cut.borders[:-1], event.start_token) - 1))


def joined(ranks: Sequence[RecordedStep], title: str) -> Timeline:
    """One timeline of what all ranks saw, from the moment the first of them began."""
    origin = min((rank.began for rank in ranks), default=0.0)
    events = [
        replace(event, start=event.start + rank.began - origin, end=event.end + rank.began - origin)
        for rank in ranks
        for event in rank.events
    ]
    return Timeline(title, tuple(events), is_predicted=False)
