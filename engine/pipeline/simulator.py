"""`Simulator`: runs a schedule on paper: what a step takes if every nano-operation takes what the cost model says.

A step starts when its lane has finished the one before and all that it waits for has run; where lanes divide the
execution units, it also waits until its share is free, and for the steps that the schedule starts before it. While it
runs, its speed is what the cost model gives it beside what runs on the other lanes at that moment. No plan is judged by
anything else before it is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.batch_shape import BatchShape
from engine.pipeline.cost_model import CostModel
from engine.pipeline.dependencies import Dependencies
from engine.pipeline.graph import OperationGraph
from engine.pipeline.instance import part_of
from engine.pipeline.schedule import ALL_UNITS, Schedule, ScheduleError
from engine.pipeline.timeline import Timeline, TimelineEvent

_PERIOD_LAYERS = 36
_SETTLED = 12
_EPSILON = 1e-9


@dataclass(frozen=True, slots=True)
class Run:
    """When step `step` of a schedule runs in layer `layer`: seconds since the beginning."""

    step: int
    layer: int
    start: float
    end: float


class Simulator:
    """One schedule with the prices of its steps; raises `ScheduleError` for a step that names no node of the graph."""

    def __init__(self, schedule: Schedule, graph: OperationGraph, costs: CostModel, shape: BatchShape) -> None:
        unknown = sorted({step.node for _, step in schedule.steps} - graph.by_name.keys())
        if unknown:
            raise ScheduleError(f"the graph has no node {', '.join(unknown)}; it has {', '.join(graph.by_name)}.")
        dependencies = Dependencies.of(schedule, graph)
        self.schedule = schedule
        self._costs = costs
        self._steps = [placed.step for placed in dependencies.steps]
        self._nodes = [graph.by_name[step.node] for step in self._steps]
        self._waits = dependencies.waits
        self._lane_of = [placed.lane for placed in dependencies.steps]
        self._lanes = {lane: [i for i, other in enumerate(self._lane_of) if other is lane] for lane in schedule.lanes}
        self._feeds: list[list[tuple[int, int]]] = [[] for _ in self._steps]
        for later, wait in enumerate(self._waits):
            for earlier, lag in wait:
                self._feeds[earlier].append((later, lag))
        self._seconds = [
            costs.seconds(node, part_of(shape, schedule.cut, node, step.start, step.stop))
            for node, step in zip(self._nodes, self._steps, strict=True)
        ]
        self._shares = [step.share if costs.shares_units else 0 for step in self._steps]
        self._speeds: dict[tuple[int, ...], list[float]] = {}

    def step_seconds(self, num_layers: int) -> float:
        """Time of `num_layers` layers, the first one's head and the last one's tail included."""
        return max((run.end for run in self.runs(num_layers)), default=0.0)

    def period_seconds(self) -> float:
        """Time from one layer to the next, far from the first and the last."""
        ends = [0.0] * _PERIOD_LAYERS
        for run in self.runs(_PERIOD_LAYERS):
            ends[run.layer] = max(ends[run.layer], run.end)
        return (ends[_PERIOD_LAYERS - _SETTLED] - ends[_SETTLED]) / (_PERIOD_LAYERS - 2 * _SETTLED)

    def timeline(self, num_layers: int, title: str) -> Timeline:
        """The predicted events of a step."""
        borders = self.schedule.cut.borders
        nano_batch_of = [sum(border <= step.start for border in borders[1:]) for step in self._steps]
        events = (
            TimelineEvent(
                operation=self._steps[run.step].node,
                lane=self._lane_of[run.step],
                start=run.start,
                end=run.end,
                layer=run.layer,
                start_token=self._steps[run.step].start,
                stop_token=self._steps[run.step].stop,
                nano_batch=nano_batch_of[run.step],
                share=self._steps[run.step].share if self._costs.shares_units else ALL_UNITS,
            )
            for run in self.runs(num_layers)
        )
        return Timeline(title, tuple(events), is_predicted=True)

    def runs(self, num_layers: int) -> list[Run]:
        """Every step of every layer in the order in which they end; raises `ScheduleError` if they block each other."""
        size = len(self._steps)
        missing = [
            sum(lag <= layer for _, lag in wait) for layer in range(num_layers) for wait in self._waits
        ]  # of step i in layer l at l * size + i
        queues = [self._queue(steps, num_layers) for steps in self._lanes.values()]
        heads = [0] * len(queues)
        turns = self._turns(num_layers)
        running: dict[int, list[float]] = {}  # lane -> [step and layer, start, seconds left alone]
        waiting: list[int] = []  # lanes whose head waits for units or for its turn, in the order of becoming ready
        idle = list(range(len(queues)))
        now, free, found = 0.0, ALL_UNITS, list[Run]()
        while True:
            for lane in tuple(idle):
                if heads[lane] < len(queues[lane]) and not missing[queues[lane][heads[lane]]]:
                    idle.remove(lane)
                    waiting.append(lane)
            while waiting:
                lane = turns[-1] if turns else waiting[0]
                if lane not in waiting or self._shares[queues[lane][heads[lane]] % size] > free:
                    break
                waiting.remove(lane)
                if turns:
                    turns.pop()
                task = queues[lane][heads[lane]]
                share = self._shares[task % size]
                running[lane] = [task, now, self._seconds[task % size]]
                free -= share
            if not running:
                break
            lanes = sorted(running)
            speeds = self._speeds_of(tuple(int(running[lane][0]) % size for lane in lanes))
            delta = min(running[lane][2] / speed for lane, speed in zip(lanes, speeds, strict=True))
            now += delta
            for lane, speed in zip(lanes, speeds, strict=True):
                state = running[lane]
                state[2] -= delta * speed
                task = int(state[0])
                if state[2] <= _EPSILON * self._seconds[task % size]:
                    del running[lane]
                    layer, step = divmod(task, size)
                    free += self._shares[step]
                    heads[lane] += 1
                    idle.append(lane)
                    found.append(Run(step, layer, state[1], now))
                    for later, lag in self._feeds[step]:
                        if layer + lag < num_layers:
                            missing[later + (layer + lag) * size] -= 1
            idle.sort()
        if len(found) < size * num_layers:
            raise ScheduleError(self._deadlock(queues, heads, {(run.step, run.layer) for run in found}))
        return found

    def _queue(self, steps: Sequence[int], num_layers: int) -> list[int]:
        """What a lane runs, period after period."""
        last_delay = max((self._steps[step].delay for step in steps), default=0)
        return [
            (period - self._steps[step].delay) * len(self._steps) + step
            for period in range(num_layers + last_delay)
            for step in steps
            if 0 <= period - self._steps[step].delay < num_layers
        ]

    def _turns(self, num_layers: int) -> list[int]:
        """The lanes in the order in which they start their steps, last first; empty where units are not divided."""
        if not self.schedule.starts or not self._costs.shares_units:
            return []
        queues = {lane: iter(steps) for lane, steps in self._lanes.items()}
        lanes = list(self._lanes)
        period = [(lanes.index(lane), self._steps[next(queues[lane])].delay) for lane in self.schedule.starts]
        last_delay = max(delay for _, delay in period)
        turns = [
            lane
            for number in range(num_layers + last_delay)
            for lane, delay in period
            if 0 <= number - delay < num_layers
        ]
        return turns[::-1]

    def _speeds_of(self, steps: tuple[int, ...]) -> list[float]:
        """Of steps that run together, each one's speed."""
        if steps not in self._speeds:
            placed = [(self._nodes[step], self._steps[step].share) for step in steps]
            self._speeds[steps] = [
                self._costs.speed(node, share, placed[:i] + placed[i + 1 :]) for i, (node, share) in enumerate(placed)
            ]
        return self._speeds[steps]

    def _deadlock(self, queues: Sequence[Sequence[int]], heads: Sequence[int], done: set[tuple[int, int]]) -> str:
        """Names the first step of every lane that cannot start, and what it waits for."""
        size, reasons = len(self._steps), []
        for queue, head in zip(queues, heads, strict=True):
            if head < len(queue):
                layer, step = divmod(queue[head], size)
                blockers = [
                    f"{self._steps[earlier]} of layer {layer - lag}"
                    for earlier, lag in self._waits[step]
                    if lag <= layer and (earlier, layer - lag) not in done
                ]
                reasons.append(f"{self._steps[step]} of layer {layer} waits for {' and '.join(blockers)}")
        return f"the lanes wait for each other for ever: {'; '.join(reasons)}."
