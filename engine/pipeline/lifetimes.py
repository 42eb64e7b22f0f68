"""`Lifetime`: which rows of a value are written and read together, and when, in every layer of a run.

"When" is a partial order: one step happens before another iff lane order and dependencies say so, whatever the
durations. It is kept as one bit set per step of all layers, in the order of `dispatch_order`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from engine.pipeline.dependencies import kind_ranges
from engine.pipeline.dispatch import Dispatch, dispatch_order
from engine.pipeline.graph import LAYER_INPUT, OperationGraph
from engine.pipeline.schedule import Lane, Schedule, ScheduleError


@dataclass(frozen=True, slots=True)
class Life:
    """One layer's use of some rows: the first write (None: before the run) and a bit for each step after the last."""

    first: int | None
    followers: int

    def is_before(self, other: "Life") -> bool:
        """Whether every use of this life happens before the other begins."""
        return other.first is not None and bool(self.followers >> other.first & 1)

    def meets(self, other: "Life") -> bool:
        """Whether the two may be live at the same time."""
        return not (self.is_before(other) or other.is_before(self))


@dataclass(frozen=True, slots=True)
class Lifetime:
    """Rows `start` to `stop` in the place of value `owner`, and their lives layer after layer."""

    owner: str
    start: int
    stop: int
    lives: tuple[Life, ...]

    def meets(self, other: "Lifetime") -> bool:
        """Whether a life of one may be live at the same time as one of the other."""
        return any(mine.meets(others) for mine in self.lives for others in other.lives)


@dataclass(frozen=True, slots=True)
class _Access:
    """A step of the layer, or of the next one where `lag` is 1, that reads or writes rows of a value."""

    value: str
    step: int
    start: int
    stop: int
    lag: int
    is_write: bool


def find_lifetimes(
    schedule: Schedule, graph: OperationGraph, owners: Mapping[str, str], in_place: Mapping[str, str], num_layers: int
) -> list[Lifetime]:
    """The lifetimes of all values, where value v lies in the place of owners[v].

    Raises `ScheduleError` where rows would be written while an earlier content of their own place is still needed.
    """
    # With delays up to d, two lives d + 1 layers apart meet if any further apart do, and the steps that put them in
    # order are within 3 d + 3 layers. One layer more, and the run has a beginning, a middle and an end.
    delay = max((step.delay for _, step in schedule.steps), default=0)
    run = _Run(schedule, graph, min(num_layers, 3 * delay + 4))
    depths = {value: _depth(value, in_place) for value in owners}
    found: list[Lifetime] = []
    for owner in dict.fromkeys(owners.values()):
        accesses = [access for value in owners if owners[value] == owner for access in run.accesses(value)]
        borders = sorted({border for access in accesses for border in (access.start, access.stop)})
        for start, stop in pairwise(borders):
            here = [access for access in accesses if access.start <= start and stop <= access.stop]
            writes = sorted((access for access in here if access.is_write), key=lambda write: depths[write.value])
            if writes:
                found.append(run.lifetime(owner, start, stop, writes, here))
    return found


def _depth(value: str, in_place: Mapping[str, str]) -> int:
    depth = 0
    while value in in_place:
        value, depth = in_place[value], depth + 1
    return depth


class _Run:
    """A run of some layers and its partial order."""

    def __init__(self, schedule: Schedule, graph: OperationGraph, num_layers: int) -> None:
        self._schedule, self._graph, self._num_layers = schedule, graph, num_layers
        order = dispatch_order(schedule, graph, num_layers)
        self._places = {(dispatch.placed.index, dispatch.layer): place for place, dispatch in enumerate(order)}
        self._after = _after(order)
        self._steps = [step for _, step in schedule.steps]

    def accesses(self, value: str) -> Iterator[_Access]:
        """Every write and read of a value; the layer's output is read by the next layer too."""
        for index, step in enumerate(self._steps):
            node = self._graph.by_name[step.node]
            for start, stop in kind_ranges(self._schedule.cut, step.start, step.stop, node.tokens):
                if value in node.outputs:
                    yield _Access(value, index, start, stop, 0, True)
                if value in node.inputs:
                    yield _Access(value, index, start, stop, 0, False)
                if value == self._graph.output and LAYER_INPUT in node.inputs:
                    yield _Access(value, index, start, stop, 1, False)

    def lifetime(
        self, owner: str, start: int, stop: int, writes: Sequence[_Access], here: Sequence[_Access]
    ) -> Lifetime:
        """The lives of rows that are written by `writes`, in this order, and read by those `here` that read them."""
        written = {write.value for write in writes}
        accesses = [access for access in here if access.value in written]
        rows = f"rows {start} to {stop} of {owner}"
        for layer in range(self._num_layers):
            for earlier, later in pairwise(writes):
                over = self._life([access for access in accesses if access.value == earlier.value], layer, later.step)
                if not over.followers >> self._places[later.step, layer] & 1:
                    raise ScheduleError(
                        f"{self._steps[later.step]} would overwrite {rows} while {earlier.value} may be needed:"
                        f" {later.value} must have a buffer of its own."
                    )
        is_output = self._graph.output in written
        lives = [Life(None, self._life(accesses, -1).followers)] if is_output else []
        lives += [self._life(accesses, layer) for layer in range(self._num_layers)]
        lives += [Life(lives.pop().first, 0)] if is_output else []
        for before, after in pairwise(lives):
            if not before.is_before(after):
                raise ScheduleError(
                    f"{self._steps[writes[0].step]} may overwrite {rows} while a step of the layer before still needs"
                    f" them: nothing makes it wait, so what reads {owner} must lead to the layer's output."
                )
        return Lifetime(owner, start, stop, tuple(lives))

    def _life(self, accesses: Sequence[_Access], layer: int, without: int | None = None) -> Life:
        """The life that these accesses make in a layer, leaving out one step."""
        followers = -1
        places = []
        for access in accesses:
            place = self._places.get((access.step, layer + access.lag))
            if place is not None and access.step != without:
                followers &= self._after[place]
                places.append(place)
        return Life(min(places, default=None), followers)


def _after(order: Sequence[Dispatch]) -> list[int]:
    """For every place of the order, a bit for each place that happens after it."""
    after = [0] * len(order)
    next_on_lane: dict[Lane, int] = {}
    for place in range(len(order) - 1, -1, -1):
        dispatch = order[place]
        following = next_on_lane.get(dispatch.placed.lane)
        if following is not None:
            after[place] |= after[following] | 1 << following
        next_on_lane[dispatch.placed.lane] = place
        for wait in dispatch.waits:
            after[wait] |= after[place] | 1 << place
    return after
