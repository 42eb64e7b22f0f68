"""Lower bounds on the period of a layer that is cut in a given way.

`simple_bound` needs no solver. `configuration_bound` is a linear program over the sets of nano-operations that can run
at the same time: in whatever order they run, at every moment some such set does, with shares that fit; how long each
set must run for all the work to be done bounds the period from below. Speeds may depend on who runs beside whom, so
the bound holds for pairwise interference as well, and for any number of layers, periodic or not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product

from engine.errors import ConfigError
from engine.pipeline.instance import Instance
from engine.pipeline.sharing import Sharing


@dataclass(frozen=True, slots=True)
class ConfigurationBound:
    """`seconds` of a period at least; `speeds`: each nano-operation's mean speed in the solution that takes so long."""

    seconds: float
    speeds: tuple[float, ...]


def simple_bound(instance: Instance, sharing: Sharing) -> float:
    """The most of: work on a lane, work of a nano-batch that is one after the other, units times time over all units."""
    best = [sharing.modes(operation.node)[-1].speed for operation in instance.operations]
    seconds = [operation.seconds / speed for operation, speed in zip(instance.operations, best, strict=True)]
    bound = max(sum(seconds[i] for i in mine) for mine in instance.lanes.values())
    bound = max(bound, _longest_chain(instance, seconds))
    if sharing.costs.shares_units:
        energy = sum(
            operation.seconds * min(mode.share / mode.speed for mode in sharing.modes(operation.node))
            for operation in instance.operations
        )
        bound = max(bound, energy / 10)
    return bound


def configuration_bound(instance: Instance, sharing: Sharing) -> ConfigurationBound:
    """Solve the linear program; raises `ConfigError` where OR-tools is not installed."""
    try:
        from ortools.linear_solver import pywraplp
    except ImportError as error:
        raise ConfigError("planning needs OR-tools: pip install ortools.") from error
    solver = pywraplp.Solver.CreateSolver("GLOP")
    infinity = solver.infinity()
    objective = solver.Objective()
    rows = [solver.Constraint(operation.seconds, infinity) for operation in instance.operations]
    columns = []
    for team in _teams(instance):
        for speeds in sharing.speeds([instance.operations[i].node for i in team]):
            column = solver.NumVar(0, infinity, "")
            objective.SetCoefficient(column, 1)
            for index, speed in zip(team, speeds, strict=True):
                rows[index].SetCoefficient(column, speed)
            columns.append((column, team))
    objective.SetMinimization()
    if solver.Solve() != pywraplp.Solver.OPTIMAL:
        return ConfigurationBound(0.0, (1.0,) * len(rows))
    running = [0.0] * len(rows)
    for column, team in columns:
        for index in team:
            running[index] += column.solution_value()
    speeds = tuple(
        min(1.0, operation.seconds / time) if time > 0 else 1.0
        for operation, time in zip(instance.operations, running, strict=True)
    )
    return ConfigurationBound(objective.Value(), speeds)


def _teams(instance: Instance) -> Iterator[list[int]]:
    """The sets of nano-operations, at most one per lane, that can run together."""
    for choice in product(*([None, *mine] for mine in instance.lanes.values())):
        team = [index for index in choice if index is not None]
        if team and not any(pair in instance.exclusive for pair in combinations(team, 2)):
            yield team


def _longest_chain(instance: Instance, seconds: list[float]) -> float:
    """The most time that nano-operations take one after the other in a layer before the next one can follow."""
    reached: dict[int, float] = {}
    before: dict[int, list[int]] = {}
    for i, j, lag in instance.chain_edges:
        if not lag:
            before.setdefault(j, []).append(i)

    def end(index: int) -> float:
        if index not in reached:
            reached[index] = seconds[index] + max((end(other) for other in before.get(index, [])), default=0.0)
        return reached[index]

    return max(end(index) for index in range(len(seconds)))
