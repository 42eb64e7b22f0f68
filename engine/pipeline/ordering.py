"""The order and the shares of one way to cut a layer: a CP-SAT model of one period.

Time is a circle as long as the period T, which is to be small. Every nano-operation has a start on it, a second copy
of its interval one period later (that makes the circle a line while T stays a variable), and a stage: whether it
runs in the period in which its layer begins or in the next. A dependency inside a stage orders two starts; one into
the next stage goes round the circle. The longest nano-operation of the compute lane begins the circle.

Each nano-batch waits, through whatever it runs last, for its own last layer only; so one may be any number of periods
ahead of the other, and the KV writes that a later nano-batch reads are met by letting it follow, not by a later start.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from engine.errors import ConfigError
from engine.pipeline.instance import Instance
from engine.pipeline.schedule import ALL_UNITS, Lane

_SEED = 1


@dataclass(frozen=True, slots=True)
class TimedMode:
    """A share and how many time units a nano-operation takes with it."""

    share: int
    duration: int


@dataclass(frozen=True, slots=True)
class PeriodicOrder:
    """A solution: for every nano-operation its start on the circle and its mode."""

    period: int
    starts: tuple[int, ...]
    modes: tuple[TimedMode, ...]

    def permuted(self, sources: Sequence[int]) -> "PeriodicOrder":
        """The order of an instance whose nano-operation i is `sources[i]` here."""
        return PeriodicOrder(self.period, tuple(self.starts[i] for i in sources), tuple(self.modes[i] for i in sources))


@dataclass(frozen=True, slots=True)
class OrderingResult:
    """`order` is None if none was found; no order has a period below `bound` time units (infinite: none at all)."""

    order: PeriodicOrder | None
    bound: float


def solve_order(
    instance: Instance,
    modes: Sequence[Sequence[TimedMode]],
    *,
    lower: int,
    upper: int,
    seconds: float,
    workers: int,
    divides_units: bool,
    hint: PeriodicOrder | None = None,
) -> OrderingResult:
    """Search for `seconds` an order with a period from `lower` to `upper`; raises `ConfigError` without OR-tools."""
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise ConfigError("planning needs OR-tools: pip install ortools.") from error
    allowed = [[mode for mode in mine if mode.duration <= upper] for mine in modes]
    if lower > upper or not all(allowed):
        return OrderingResult(None, float("inf"))
    model = _OrderModel(cp_model.CpModel(), instance, allowed, lower, upper, divides_units)
    if hint is not None:
        model.add_hint(hint)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = workers
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.random_seed = _SEED
    status = solver.solve(model.model)
    if status == cp_model.INFEASIBLE:
        return OrderingResult(None, float("inf"))
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return OrderingResult(None, solver.best_objective_bound)
    return OrderingResult(model.order(solver), solver.best_objective_bound)


class _OrderModel:
    def __init__(
        self,
        model: Any,
        instance: Instance,
        modes: Sequence[Sequence[TimedMode]],
        lower: int,
        upper: int,
        divides_units: bool,
    ) -> None:
        self.model, self.instance, self.modes, self.upper = model, instance, modes, upper
        self.period = model.new_int_var(lower, upper, "period")
        self.starts = [model.new_int_var(0, upper - 1, f"start {operation}") for operation in instance.operations]
        self.stages = [model.new_bool_var(f"stage {operation}") for operation in instance.operations]
        self.choices = [self._choice(mine) for mine in modes]
        self.durations = [self._chosen(index, "duration") for index in range(len(modes))]
        self.shares = [self._chosen(index, "share") for index in range(len(modes))]
        self.origin = max(instance.lanes[Lane.COMPUTE], key=lambda index: min(mode.duration for mode in modes[index]))
        self._place_on_circle(divides_units)
        self._order_dependencies()
        model.minimize(self.period)

    def _choice(self, modes: Sequence[TimedMode]) -> list[Any]:
        if len(modes) == 1:
            return [1]
        literals = [self.model.new_bool_var("") for _ in modes]
        self.model.add_exactly_one(literals)
        return literals

    def _chosen(self, index: int, quantity: str) -> Any:
        values = [getattr(mode, quantity) for mode in self.modes[index]]
        if len(values) == 1:
            return values[0]
        chosen = self.model.new_int_var(min(values), max(values), f"{quantity} {self.instance.operations[index]}")
        self.model.add(
            chosen == sum(literal * value for literal, value in zip(self.choices[index], values, strict=True))
        )
        return chosen

    def _place_on_circle(self, divides_units: bool) -> None:
        """Lanes hold one nano-operation at a time, and shares fit into all units, around the circle."""
        model, upper = self.model, self.upper
        model.add(self.starts[self.origin] == 0)
        pairs = []
        for index, (start, duration) in enumerate(zip(self.starts, self.durations, strict=True)):
            model.add(start <= self.period - 1)
            second = model.new_int_var(0, 2 * upper, "")
            model.add(second == start + self.period)
            pairs.append((self._interval(start, duration), self._interval(second, duration)))
            if self.instance.operations[index].lane is Lane.COMPUTE:  # one of them begins the circle: none is cut by it
                model.add(start + duration <= self.period)
        for lane, mine in self.instance.lanes.items():
            copies = 1 if lane is Lane.COMPUTE else 2
            model.add_no_overlap([pairs[index][copy] for index in mine for copy in range(copies)])
            model.add(sum(self.durations[index] for index in mine) <= self.period)
        if divides_units:
            intervals = [interval for pair in pairs for interval in pair]
            model.add_cumulative(intervals, [share for share in self.shares for _ in range(2)], ALL_UNITS)
            model.add(sum(self._energy(index) for index in range(len(pairs))) <= ALL_UNITS * self.period)

    def _interval(self, start: Any, duration: Any) -> Any:
        if isinstance(duration, int):
            return self.model.new_fixed_size_interval_var(start, duration, "")
        return self.model.new_interval_var(start, duration, self.model.new_int_var(0, 3 * self.upper, ""), "")

    def _energy(self, index: int) -> Any:
        return sum(
            literal * (mode.duration * mode.share)
            for literal, mode in zip(self.choices[index], self.modes[index], strict=True)
        )

    def _order_dependencies(self) -> None:
        model, instance = self.model, self.instance
        flat = [model.new_int_var(-3 * self.upper, 3 * self.upper, "") for _ in self.starts]
        for i, j, lag in instance.chain_edges:
            end, start = self.starts[i] + self.durations[i], self.starts[j]
            model.add(flat[j] + lag * self.period >= flat[i] + self.durations[i])  # redundant: circles of dependencies
            model.add(end <= start + self.period)
            if lag:  # i is in stage 1
                model.add(end <= start).only_enforce_if(~self.stages[j])
            else:
                model.add_implication(self.stages[i], self.stages[j])
                model.add(end <= start).only_enforce_if(self.stages[i])
                model.add(end <= start).only_enforce_if(~self.stages[j])
        for index in instance.last:
            model.add(self.stages[index] == 1)

    def add_hint(self, order: PeriodicOrder) -> None:
        """Begin the search near a solution of an instance with the same nano-operations."""
        self.model.add_hint(self.period, order.period)
        for index, (start, mode) in enumerate(zip(order.starts, order.modes, strict=True)):
            self.model.add_hint(self.starts[index], min(start, self.upper - 1))
            if len(self.modes[index]) > 1:
                for literal, mine in zip(self.choices[index], self.modes[index], strict=True):
                    self.model.add_hint(literal, mine.share == mode.share)

    def order(self, solver: Any) -> PeriodicOrder:
        """What the solver found."""
        return PeriodicOrder(
            solver.value(self.period),
            tuple(solver.value(start) for start in self.starts),
            tuple(
                next(mode for literal, mode in zip(choice, mine, strict=True) if solver.value(literal))
                for choice, mine in zip(self.choices, self.modes, strict=True)
            ),
        )


def timed_modes(seconds: float, speeds: Sequence[tuple[int, float]], unit: float) -> list[TimedMode]:
    """What each (share, speed) takes in whole time units: rounded up, and one at least."""
    return [TimedMode(share, max(1, ceil(seconds / speed / unit - 1e-6))) for share, speed in speeds]
