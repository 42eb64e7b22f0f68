"""Lower bounds on the period of a layer that is cut in a given way.

`simple_bound` needs no solver. `ConfigurationBounds` solves a linear program over the sets of nano-operations that can
run at the same time: in whatever order they run, at every moment some such set does, with shares that fit; how long
each set must run for all the work to be done bounds the period from below. Speeds may depend on who runs beside whom,
so the bound holds for pairwise interference as well, and for any number of layers, periodic or not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from engine.errors import ConfigError
from engine.pipeline.instance import Instance
from engine.pipeline.schedule import ALL_UNITS
from engine.pipeline.sharing import Sharing, TeamMode

_TOLERANCE = 1e-6  # of the solver's numbers, relative


@dataclass(frozen=True, slots=True)
class ConfigurationBound:
    """`seconds` of a period at least, and each nano-operation's mean speed and its shares in the solution so short."""

    seconds: float
    speeds: tuple[float, ...]
    shares: tuple[frozenset[int], ...]


def simple_bound(instance: Instance, sharing: Sharing) -> float:
    """The most of: work on a lane, a nano-batch's chain of work, and units times time over all units."""
    operations = instance.operations
    best = [max(mode.speed for mode in sharing.modes(operation.node)) for operation in operations]
    seconds = [operation.seconds / speed for operation, speed in zip(operations, best, strict=True)]
    bound = max(sum(seconds[i] for i in mine) for mine in instance.lanes.values())
    bound = max(bound, _longest_chain(instance, seconds))
    if not sharing.is_separable or not sharing.costs.shares_units:
        return bound
    energy = sum(
        operation.seconds * min(mode.share / mode.speed for mode in sharing.modes(operation.node))
        for operation in operations
    )
    return max(bound, energy / ALL_UNITS)


class ConfigurationBounds:
    """The linear programs of a search. Instances of one structure differ in their durations only, so they share one.

    A solution's prices (dual values) are a bound for all instances of the structure, which costs no solving:
    `quick` is the best of these.
    """

    def __init__(self, sharing: Sharing) -> None:
        self._sharing = sharing
        self._programs: dict[object, _Program] = {}

    def quick(self, instance: Instance) -> float:
        """What the prices of the structure's other instances prove; 0 if there are none yet."""
        program = self._programs.get(_structure(instance))
        return 0.0 if program is None else program.quick(instance)

    def tight(self, instance: Instance) -> ConfigurationBound:
        """Solve the linear program; raises `ConfigError` where OR-tools is not installed."""
        key = _structure(instance)
        if key not in self._programs:
            self._programs[key] = _Program(instance, self._sharing)
        return self._programs[key].solve(instance)


class _Program:
    """Minimise the time of all sets together, so that each nano-operation's speeds in them add up to its work."""

    def __init__(self, instance: Instance, sharing: Sharing) -> None:
        try:
            from ortools.linear_solver import pywraplp
        except ImportError as error:
            raise ConfigError("planning needs OR-tools: pip install ortools.") from error
        self._optimal = pywraplp.Solver.OPTIMAL
        self._solver: Any = pywraplp.Solver.CreateSolver("GLOP")
        self._rows = [self._solver.Constraint(0, self._solver.infinity()) for _ in instance.operations]
        self._columns: list[tuple[Any, list[int], TeamMode]] = []
        self._prices: list[list[float]] = []
        objective = self._solver.Objective()
        for team in _teams(instance):
            for mode in sharing.team_modes([instance.operations[i].node for i in team]):
                column = self._solver.NumVar(0, self._solver.infinity(), "")
                objective.SetCoefficient(column, 1)
                for index, speed in zip(team, mode.speeds, strict=True):
                    self._rows[index].SetCoefficient(column, speed)
                self._columns.append((column, team, mode))
        objective.SetMinimization()

    def quick(self, instance: Instance) -> float:
        seconds = [operation.seconds for operation in instance.operations]
        worth = (sum(map(float.__mul__, prices, seconds)) for prices in self._prices)
        return max(worth, default=0.0) * (1 - _TOLERANCE)

    def solve(self, instance: Instance) -> ConfigurationBound:
        seconds = [operation.seconds for operation in instance.operations]
        scale = sum(seconds) or 1.0  # the solver's tolerances are meant for numbers near one
        for row, duration in zip(self._rows, seconds, strict=True):
            row.SetBounds(duration / scale, self._solver.infinity())
        if self._solver.Solve() != self._optimal:
            return ConfigurationBound(0.0, (1.0,) * len(seconds), (frozenset(range(ALL_UNITS + 1)),) * len(seconds))
        self._prices.append([max(0.0, row.dual_value()) for row in self._rows])
        running, done = [0.0] * len(seconds), [0.0] * len(seconds)
        shares: list[set[int]] = [set() for _ in seconds]
        for column, team, mode in self._columns:
            if (value := column.solution_value()) > _TOLERANCE:
                for index, share, speed in zip(team, mode.shares, mode.speeds, strict=True):
                    running[index] += value
                    done[index] += value * speed
                    shares[index].add(share)
        return ConfigurationBound(
            self._solver.Objective().Value() * scale * (1 - _TOLERANCE),
            tuple(work / time if time else 1.0 for work, time in zip(done, running, strict=True)),
            tuple(map(frozenset, shares)),
        )


def _structure(instance: Instance) -> object:
    """Equal for instances of which the same sets of nano-operations can run together, at the same speeds."""
    return tuple(operation.node.name for operation in instance.operations), instance.exclusive


def _teams(instance: Instance) -> Iterator[list[int]]:
    """The sets of nano-operations, at most one per lane, that can run together."""
    for choice in product(*([None, *mine] for mine in instance.lanes.values())):
        team = [index for index in choice if index is not None]
        if team and not any(pair in instance.exclusive for pair in combinations(team, 2)):
            yield team


def _longest_chain(instance: Instance, seconds: list[float]) -> float:
    """The most time that nano-operations take one after the other in a layer before the next one can follow."""
    before: dict[int, list[int]] = {}
    for i, j, lag in instance.chain_edges:
        if not lag:
            before.setdefault(j, []).append(i)
    reached: dict[int, float] = {}

    def end(index: int) -> float:
        if index not in reached:
            reached[index] = seconds[index] + max((end(other) for other in before.get(index, [])), default=0.0)
        return reached[index]

    return max(end(index) for index in range(len(seconds)))
