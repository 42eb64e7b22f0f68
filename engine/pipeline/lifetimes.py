"""`Lifetime`: which rows of a value are written and read together, and when, in every layer of a run.

"When" is a partial order: one step happens before another iff lane order and dependencies say so, whatever the
durations. It is kept as one bit set per step of all layers, in the order of `dispatch_order`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    """Rows `start` to `stop` in copy `copy` of the place of value `owner`, and their lives layer after layer."""

    owner: str
    copy: int
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


def run_length(num_layers: int, schedule: Schedule) -> int:
    """Layers of a run that shows whatever can happen in one of `num_layers`, even or odd as that is.

    With delays up to d, two lives d + 1 layers apart meet if any further apart do, and the steps that put them in
    order are within 3 d + 3 layers. One layer more, and the run has a beginning, a middle and an end.
    """
    enough = 3 * max((step.delay for _, step in schedule.steps), default=0) + 4
    return num_layers if num_layers <= enough else enough + (num_layers - enough) % 2


def find_lifetimes(
    schedule: Schedule, graph: OperationGraph, owners: Mapping[str, str], in_place: Mapping[str, str], num_layers: int
) -> list[Lifetime]:
    """The lifetimes of all values, where value v lies in the place of owners[v].

    A place has one copy if all that is read in a layer has been read when the next one writes, else two for layers to
    take in turn. Raises `ScheduleError` where even that is not safe, or where a value in the place of its input is
    written while that is still needed.
    """
    run = _Run(schedule, graph, run_length(num_layers, schedule))
    depths = {value: _depth(value, in_place) for value in owners}
    found: list[Lifetime] = []
    for owner in dict.fromkeys(owners.values()):
        accesses = [access for value in owners if owners[value] == owner for access in run.accesses(value)]
        borders = sorted({border for access in accesses for border in (access.start, access.stop)})
        pieces: dict[tuple[int, int], dict[int, Life]] = {}
        for start, stop in pairwise(borders):
            here = [access for access in accesses if access.start <= start and stop <= access.stop]
            writes = sorted((access for access in here if access.is_write), key=lambda write: depths[write.value])
            if writes:
                pieces[start, stop] = run.lives(writes, here)
        num_copies = _num_copies(owner, pieces.values())
        found += [
            Lifetime(owner, copy, *rows, tuple(life for layer, life in lives.items() if layer % num_copies == copy))
            for rows, lives in pieces.items()
            for copy in range(num_copies)
        ]
    return found


def _num_copies(owner: str, pieces: Iterable[Mapping[int, Life]]) -> int:
    """How many layers later the same rows can be written again."""
    for distance in (1, 2):
        if all(
            life.is_before(lives[layer + distance])
            for lives in pieces
            for layer, life in lives.items()
            if layer + distance in lives
        ):
            return distance
    raise ScheduleError(
        f"nothing makes a later layer's write to {owner} wait for this one's readers: all that reads {owner} must lead"
        f" to the layer's output."
    )


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

    def lives(self, writes: Sequence[_Access], here: Sequence[_Access]) -> dict[int, Life]:
        """By layer, the lives of rows that `writes` write in this order, and that those `here` read who read them."""
        written = {write.value for write in writes}
        accesses = [access for access in here if access.value in written]
        for earlier, later in pairwise(writes):
            before = [access for access in accesses if access.value == earlier.value and access.step != later.step]
            for layer in range(self._num_layers):
                if not self._life(before, layer).followers >> self._places[later.step, layer] & 1:
                    raise ScheduleError(
                        f"{self._steps[later.step]} would write over {earlier.value} while that may be needed:"
                        f" {later.value} must have a buffer of its own."
                    )
        lives = {layer: self._life(accesses, layer) for layer in range(self._num_layers)}
        if self._graph.output in written:  # what comes before the first layer writes it, what comes last reads it
            last = self._num_layers - 1
            lives = {-1: Life(None, self._life(accesses, -1).followers), **lives, last: Life(lives[last].first, 0)}
        return lives

    def _life(self, accesses: Sequence[_Access], layer: int) -> Life:
        """The life that these accesses make in a layer."""
        found = (self._places.get((access.step, layer + access.lag)) for access in accesses)
        places = [place for place in found if place is not None]
        followers = -1
        for place in places:
            followers &= self._after[place]
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
