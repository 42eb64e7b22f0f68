"""`Sharing`: how fast nodes can run beside each other, asked of a cost model once per set of nodes."""

from collections.abc import Sequence
from itertools import combinations, product

from engine.pipeline.cost_model import CostModel, Mode
from engine.pipeline.graph import Node
from engine.pipeline.schedule import ALL_UNITS

_EPSILON = 1e-9


class Sharing:
    """`is_separable`: no speed depends on more than the node's own share, for any two of `nodes`."""

    def __init__(self, costs: CostModel, nodes: Sequence[Node]) -> None:
        self.costs = costs
        self.is_separable = True
        self._modes: dict[str, tuple[Mode, ...]] = {}
        self._teams: dict[tuple[str, ...], list[tuple[float, ...]]] = {}
        for pair in combinations(nodes, 2):
            self.speeds(pair)

    def modes(self, node: Node) -> tuple[Mode, ...]:
        """The shares of a node, ascending, without those that are no faster than a smaller one."""
        if node.name not in self._modes:
            kept: list[Mode] = []
            for mode in sorted(self.costs.modes(node), key=lambda mode: mode.share):
                if not kept or mode.speed > kept[-1].speed + _EPSILON:
                    kept.append(mode)
            self._modes[node.name] = tuple(kept)
        return self._modes[node.name]

    def speeds(self, team: Sequence[Node]) -> list[tuple[float, ...]]:
        """What speeds the nodes of a team can have together: one tuple per way to divide the units, best ones only."""
        key = tuple(node.name for node in team)
        if key not in self._teams:
            found: dict[tuple[float, ...], None] = {}
            for modes in product(*(self.modes(node) for node in team)):
                if self.costs.shares_units and sum(mode.share for mode in modes) > ALL_UNITS:
                    continue
                placed = [(node, mode.share) for node, mode in zip(team, modes, strict=True)]
                speeds = tuple(
                    self.costs.speed(node, share, placed[:i] + placed[i + 1 :])
                    for i, (node, share) in enumerate(placed)
                )
                if any(abs(speed - mode.speed) > _EPSILON for speed, mode in zip(speeds, modes, strict=True)):
                    self.is_separable = False
                found[speeds] = None
            self._teams[key] = [mine for mine in found if not any(_is_better(other, mine) for other in found)]
        return self._teams[key]


def _is_better(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    return first != second and all(a >= b for a, b in zip(first, second, strict=True))
