"""`dispatch_order`: one order in which a single thread can issue every step of every layer of a model.

Period p of a schedule runs, lane by lane, each step as layer p - delay. The order keeps that of every lane and issues
a step after all that it depends on. Where the schedule says in which order its steps start, they are issued so, as
far as dependencies let them; else the network's steps at the first chance, so that a collective is in flight while
the thread goes on. It follows from the schedule alone and is therefore the same on every rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

from engine.pipeline.dependencies import Dependencies, PlacedStep
from engine.pipeline.graph import OperationGraph
from engine.pipeline.nano_batch import Cut
from engine.pipeline.schedule import Lane, Schedule, ScheduleError

# A network step costs the issuing thread least and takes longest to come back; on a GPU a memory-bound one is next.
_FIRST = {Lane.NETWORK: 0, Lane.MEMORY: 1, Lane.COMPUTE: 2}
_NUM_LANES = len(_FIRST)


class Dispatch(NamedTuple):
    """A step of one layer, and the places in the order that it must wait for, all of them on other lanes.

    `waits` names no more than it must: a lane runs in order, so to wait for a place is to wait for everything before
    it on its lane and for all that those waited for.
    """

    placed: PlacedStep
    layer: int
    waits: tuple[int, ...]


def dispatch_order(schedule: Schedule, graph: OperationGraph, num_layers: int) -> list[Dispatch]:
    """Every step of `num_layers` layers in the order to issue them; raises `ScheduleError` where lanes deadlock."""
    dependencies = Dependencies.of(schedule, graph)
    queues = _queues(dependencies, num_layers, schedule.starts)
    heads = [0] * _NUM_LANES
    place = [[-1] * num_layers for _ in dependencies.steps]
    order: list[Dispatch] = []
    clocks = _Clocks()
    while (number := _next_lane(queues, heads, dependencies, place)) is not None:
        _, placed, layer = queues[number][heads[number]]
        needed = [
            place[producer][layer - lag] for producer, lag in dependencies.waits[placed.index] if layer - lag >= 0
        ]
        place[placed.index][layer] = len(order)
        order.append(Dispatch(placed, layer, clocks.issue(number, needed)))
        heads[number] += 1
    if any(head < len(queue) for head, queue in zip(heads, queues, strict=True)):
        stuck = [queue[head] for head, queue in zip(heads, queues, strict=True) if head < len(queue)]
        names = " and ".join(f"{placed.step} of layer {layer} on lane {placed.lane}" for _, placed, layer in stuck)
        raise ScheduleError(f"the lanes wait for each other at {names}: put producers before their consumers.")
    return order


def nano_batches_as_begun(order: Sequence[Dispatch], cut: Cut) -> list[int]:
    """The nano-batches of `cut`, by number, in the order in which steps of the first layer first need them."""
    steps = [placed.step for placed, layer, _ in order if layer == 0]

    def begun(index: int) -> int:
        start, stop = cut.borders[index : index + 2]
        return next((place for place, step in enumerate(steps) if step.start < stop and start < step.stop), len(steps))

    return sorted(range(len(cut.nano_batches)), key=begun)


_Rank = tuple[int, int]
_Queue = list[tuple[_Rank, PlacedStep, int]]


def _queues(dependencies: Dependencies, num_layers: int, starts: Sequence[Lane]) -> list[_Queue]:
    """For every lane its (rank, step, layer)s in order; of those that can be issued, the lowest rank is."""
    lanes: list[list[PlacedStep]] = [[] for _ in range(_NUM_LANES)]
    for placed in dependencies.steps:
        lanes[_FIRST[placed.lane]].append(placed)
    queues = {lane: iter(lanes[number]) for lane, number in _FIRST.items()}
    place_of = {next(queues[lane]).index: place for place, lane in enumerate(starts)}

    def rank(period: int, placed: PlacedStep) -> _Rank:
        if place_of:
            return period, place_of[placed.index]
        return (-1, 0) if placed.lane is Lane.NETWORK else (period, _FIRST[placed.lane])

    num_periods = num_layers + max((placed.step.delay for placed in dependencies.steps), default=0)
    return [
        [
            (rank(period, placed), placed, period - placed.step.delay)
            for period in range(num_periods)
            for placed in steps
            if 0 <= period - placed.step.delay < num_layers
        ]
        for steps in lanes
    ]


def _next_lane(
    queues: Sequence[_Queue], heads: Sequence[int], dependencies: Dependencies, place: Sequence[Sequence[int]]
) -> int | None:
    """The lane to issue from; None if no lane's next step can be issued."""
    ready: list[tuple[_Rank, int]] = []
    for number, (queue, head) in enumerate(zip(queues, heads, strict=True)):
        if head < len(queue):
            rank, placed, layer = queue[head]
            waits = dependencies.waits[placed.index]
            if all(layer < lag or place[producer][layer - lag] >= 0 for producer, lag in waits):
                ready.append((rank, number))
    return min(ready)[1] if ready else None


class _Clocks:
    """Vector clocks: for every place, how far each lane has come for certain when that place is done."""

    def __init__(self) -> None:
        self._lane_of: list[int] = []
        self._clock_of: list[list[int]] = []
        self._now = [[0] * _NUM_LANES for _ in range(_NUM_LANES)]

    def issue(self, lane: int, needed: Sequence[int]) -> tuple[int, ...]:
        """Append a place on `lane`; returns those of `needed` that nothing earlier or else in it implies."""
        now = self._now[lane]
        latest: dict[int, int] = {}
        for place in needed:
            other = self._lane_of[place]
            if self._clock_of[place][other] > now[other]:
                latest[other] = max(latest.get(other, -1), place)
        waits = tuple(place for other, place in latest.items() if not self._implied(other, place, latest))
        clock = [max(parts) for parts in zip(now, *(self._clock_of[place] for place in waits), strict=True)]
        clock[lane] += 1
        self._now[lane] = clock
        self._lane_of.append(lane)
        self._clock_of.append(clock)
        return waits

    def _implied(self, lane: int, place: int, latest: dict[int, int]) -> bool:
        """Whether another of the `latest` places is done only after this one is."""
        count = self._clock_of[place][lane]
        return any(self._clock_of[other][lane] >= count for other in latest.values() if other != place)
