"""`Search`: best first through the partitions of a layer, with bounds that are tightened only where it matters."""

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil

from engine.batch_shape import BatchShape
from engine.pipeline.bounds import ConfigurationBounds, simple_bound
from engine.pipeline.cost_model import CostModel
from engine.pipeline.graph import OperationGraph
from engine.pipeline.instance import Instance, time_unit
from engine.pipeline.ordering import OrderingResult, PeriodicOrder, TimedMode, solve_order, timed_modes
from engine.pipeline.partition import Partition
from engine.pipeline.periodic import schedule_of
from engine.pipeline.plan import Candidate, SearchState, StopReason
from engine.pipeline.schedule import ALL_UNITS, Lane, Schedule
from engine.pipeline.sharing import Sharing
from engine.pipeline.simulator import Simulator

_LEAST_UNITS = 10_000
_RADII = (1, 2, ALL_UNITS)
_FIRST_SLICE = 1 / 12
_BOUNDING_SHARE = 0.2
_SLACK_OF_ESTIMATES = 1.05


@dataclass(frozen=True, slots=True)
class Problem:
    """What is planned: a layer's graph, prices, a batch, how many layers, the lanes of the device."""

    graph: OperationGraph
    costs: CostModel
    shape: BatchShape
    num_layers: int
    lanes: tuple[Lane, ...]

    def instance(self, partition: Partition) -> Instance:
        """The scheduling problem of a partition."""
        return Instance.of(partition, self.graph, self.costs, self.shape, self.lanes)

    def candidate(self, schedule: Schedule) -> Candidate:
        """A schedule with what the simulator says of it."""
        simulator = Simulator(schedule, self.graph, self.costs, self.shape)
        return Candidate(
            schedule=schedule,
            period_seconds=simulator.period_seconds(),
            step_seconds=simulator.step_seconds(self.num_layers),
        )


@dataclass(eq=False)
class _Entry:
    """A partition under search. `bound` in seconds; `is_solved` once no more search can help.

    The search begins with the shares of the linear program's solution and their neighbours, and widens `level` by
    `level`: with few shares to choose from it is many times faster, and loses little.
    """

    partition: Partition
    instance: Instance
    bound: float
    modes: list[list[TimedMode]] = field(default_factory=list)
    shares: tuple[frozenset[int], ...] = ()
    order: PeriodicOrder | None = None
    level: int = 0
    num_slices: int = 0
    is_solved: bool = False

    @property
    def is_widest(self) -> bool:
        """Whether the level leaves no share out."""
        return self.modes_of_level() == self.modes

    def modes_of_level(self) -> list[list[TimedMode]]:
        """The modes to choose from at this level."""
        radius = _RADII[self.level]
        return [
            [mode for mode in mine if min(used) - radius <= mode.share <= max(used) + radius] or mine
            if used
            else mine[-1:]
            if radius < ALL_UNITS
            else mine
            for mine, used in zip(self.modes, self.shares, strict=True)
        ]


class Search:
    """One run of the search over `family`."""

    def __init__(
        self,
        problem: Problem,
        family: Sequence[Partition],
        sequential: Candidate,
        *,
        seconds: float,
        workers: int,
        tolerance: float,
    ) -> None:
        self._started = time.perf_counter()
        self._problem = problem
        self._sharing = Sharing(problem.costs, problem.graph.nodes)
        self._bounds = ConfigurationBounds(self._sharing)
        self._seconds, self._workers, self._tolerance = seconds, workers, tolerance
        self._entries = [
            _Entry(partition, instance, simple_bound(instance, self._sharing))
            for partition in family
            for instance in [problem.instance(partition)]
        ]
        # By bound: (bound, tie, entry). Entries without `modes` have the simple bound only.
        self._heap = [(entry.bound, number, entry) for number, entry in enumerate(self._entries)]
        heapq.heapify(self._heap)
        self._unit = time_unit(self._entries[0].instance.operations, _LEAST_UNITS)
        self._tried: list[_Entry] = []
        self._hints: dict[tuple[str, ...], PeriodicOrder] = {}
        self._period = sequential.period_seconds
        self._candidates: dict[Schedule, Candidate] = {}
        self._favourite: _Entry | None = None
        self.num_solved = 0

    @property
    def elapsed_seconds(self) -> float:
        """Since the search was made."""
        return time.perf_counter() - self._started

    @property
    def lower_bound_seconds(self) -> float:
        """No partition of the family has a shorter period."""
        bounds = [entry.bound for entry in self._tried]
        return min([self._period, *bounds, *(bound for bound, _, _ in self._heap[:1])])

    def best(self, count: int) -> tuple[Candidate, ...]:
        """The best distinct schedules found, by the time of a step."""
        found = sorted(self._candidates.values(), key=lambda candidate: candidate.step_seconds)
        return tuple(found[:count])

    def run(self, progress: Callable[[SearchState], None]) -> StopReason:
        """Search until nothing better is left, the tolerance is met, or time is up."""
        while True:
            fresh = self._next_fresh()
            open_entries = [entry for entry in self._tried if not entry.is_solved]
            if fresh is None and not open_entries:
                is_proven = self._sharing.is_separable or self.lower_bound_seconds >= self._period - self._unit
                return StopReason.OPTIMAL if is_proven else StopReason.EXHAUSTED
            if self.lower_bound_seconds >= self._period * (1 - self._tolerance):
                return StopReason.TOLERANCE
            if self.elapsed_seconds >= self._seconds:
                return StopReason.TIME
            entry = self._choose(fresh, open_entries)
            if entry is fresh:
                heapq.heappop(self._heap)
                self._tried.append(entry)
            self._solve(entry)
            progress(
                SearchState(
                    elapsed_seconds=self.elapsed_seconds,
                    period_seconds=self._period,
                    lower_bound_seconds=self.lower_bound_seconds,
                    num_solved=self.num_solved,
                    num_partitions=len(self._entries),
                )
            )

    def _next_fresh(self) -> _Entry | None:
        """The untried partition with the lowest tight bound, left on the heap; None if none can be better."""
        while self._heap:
            bound, number, entry = self._heap[0]
            if bound >= self._period - self._unit:
                return None
            if entry.modes:
                return entry
            entry.bound = max(bound, self._bounds.quick(entry.instance))
            if entry.bound == bound:
                tight = self._bounds.tight(entry.instance)
                entry.bound = max(bound, tight.seconds)
                entry.modes = self._modes(entry.instance, tight.speeds)
                entry.shares = tight.shares
                if self.elapsed_seconds > self._seconds * _BOUNDING_SHARE:  # others may be lower: time to solve one
                    self._heap[0] = (bound, number, entry)
                    return entry
            heapq.heapreplace(self._heap, (entry.bound, number, entry))
        return None

    def _modes(self, instance: Instance, speeds: Sequence[float]) -> list[list[TimedMode]]:
        """Where lanes divide the units, every share; else one mode, as fast as the bound's solution is on average."""
        if not self._problem.costs.shares_units:
            return [
                timed_modes(operation.seconds, [(ALL_UNITS, speed)], self._unit)
                for operation, speed in zip(instance.operations, speeds, strict=True)
            ]
        return [
            timed_modes(
                operation.seconds,
                [(mode.share, mode.speed) for mode in self._sharing.modes(operation.node)],
                self._unit,
            )
            for operation in instance.operations
        ]

    def _choose(self, fresh: _Entry | None, open_entries: Sequence[_Entry]) -> _Entry:
        """Two new partitions, then again the one with the best plan, and so on."""
        if fresh is None:
            return min(open_entries, key=lambda entry: (entry.level, entry.num_slices, entry.bound))
        favourite = self._favourite
        if favourite is not None and not favourite.is_solved and self.num_solved % 3 == 2:
            return favourite
        return fresh

    def _solve(self, entry: _Entry) -> None:
        """Give a partition a slice of time; keep what is better than the best so far."""
        slack = 1.0 if self._sharing.is_separable else _SLACK_OF_ESTIMATES
        upper = ceil(self._period * slack / self._unit) - 1
        lower = max(1, ceil(entry.bound / self._unit - 1e-6)) if self._sharing.is_separable else 1
        key = tuple(str((operation.node.name, operation.nano_batch)) for operation in entry.instance.operations)
        left = self._seconds - self.elapsed_seconds
        result = solve_order(
            entry.instance,
            entry.modes_of_level(),
            lower=lower,
            upper=upper,
            seconds=max(0.05, min(self._seconds * _FIRST_SLICE * 2**entry.num_slices, left)),
            workers=self._workers,
            divides_units=self._problem.costs.shares_units,
            hint=entry.order or self._hints.get(key),
        )
        self.num_solved += 1
        entry.num_slices += 1
        if result.order is not None:
            entry.order = self._hints[key] = result.order
            self._keep(entry, result.order)
        self._raise_bound(entry, result, upper)

    def _keep(self, entry: _Entry, order: PeriodicOrder) -> None:
        """Keep an order, with that nano-batch in the lead which makes the shorter step.

        The period is the same either way, the first and last layers differ: tokens of the nano-batch that follows may
        read keys and values of the other, so it must stay behind, in one of the two ways by almost a layer.
        """
        found = [(entry.instance, order)]
        if len(entry.partition.cut.nano_batches) > 1:
            mirrored = self._problem.instance(entry.partition.mirrored)
            found.append((mirrored, order.permuted(entry.instance.places_in(mirrored))))
        divides_units = self._problem.costs.shares_units
        schedules = [schedule_of(instance, its, divides_units=divides_units) for instance, its in found]
        candidate = min(map(self._problem.candidate, schedules), key=lambda candidate: candidate.step_seconds)
        self._candidates[candidate.schedule] = candidate
        if candidate.period_seconds < self._period:
            self._period, self._favourite = candidate.period_seconds, entry

    def _raise_bound(self, entry: _Entry, result: OrderingResult, upper: int) -> None:
        """What the solver proved, less what rounding the durations up may have added."""
        is_proven = result.bound >= (upper + 1 if result.order is None else result.order.period) - 0.5
        is_widest = entry.is_widest
        if is_proven and is_widest:
            entry.is_solved = True
        elif is_proven:
            entry.level, entry.num_slices = entry.level + 1, 0
        if self._sharing.is_separable and is_widest:
            proven = min(result.bound, upper + 1)
            entry.bound = max(entry.bound, proven * self._unit - _rounding(entry, self._sharing, self._unit))


def _rounding(entry: _Entry, sharing: Sharing, unit: float) -> float:
    """The most by which the durations in time units, added up, are longer than those in seconds."""
    speeds = {
        (operation.node.name, mode.share): mode.speed
        for operation in entry.instance.operations
        for mode in sharing.modes(operation.node)
    }
    return sum(
        max(mode.duration * unit - operation.seconds / speeds[operation.node.name, mode.share] for mode in modes)
        for operation, modes in zip(entry.instance.operations, entry.modes, strict=True)
    )
