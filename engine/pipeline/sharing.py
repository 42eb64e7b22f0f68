"""`Sharing`: how fast nodes can run beside each other, asked of a cost model once per set of nodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

from engine.pipeline.cost_model import CostModel, Mode
from engine.pipeline.graph import Node
from engine.pipeline.schedule import ALL_UNITS

_EPSILON = 1e-9


@dataclass(frozen=True, slots=True)
class TeamMode:
    """Shares of nodes that run together, and the speeds that follow, in their order."""

    shares: tuple[int, ...]
    speeds: tuple[float, ...]


class Sharing:
    """`is_separable`: no speed depends on more than the node's own share, for any two of `nodes`."""

    def __init__(self, costs: CostModel, nodes: Sequence[Node]) -> None:
        self.costs = costs
        self.is_separable = True
        self._modes: dict[str, tuple[Mode, ...]] = {}
        self._teams: dict[tuple[str, ...], list[TeamMode]] = {}
        for pair in combinations(nodes, 2):
            self.team_modes(pair)

    def modes(self, node: Node) -> tuple[Mode, ...]:
        """The shares of a node, ascending, without those that are no faster than a smaller one."""
        if node.name not in self._modes:
            kept: list[Mode] = []
            for mode in sorted(self.costs.modes(node), key=lambda mode: mode.share):
                if not kept or mode.speed > kept[-1].speed + _EPSILON:
                    kept.append(mode)
            self._modes[node.name] = tuple(kept)
        return self._modes[node.name]

    def team_modes(self, team: Sequence[Node]) -> list[TeamMode]:
        """The ways of running these nodes together, without those that are no better than another for any of them."""
        key = tuple(node.name for node in team)
        if key not in self._teams:
            found: dict[tuple[float, ...], TeamMode] = {}
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
                found[speeds] = TeamMode(tuple(mode.share for mode in modes), speeds)
            self._teams[key] = [
                mode for speeds, mode in found.items() if not any(_is_better(other, speeds) for other in found)
            ]
        return self._teams[key]


def _is_better(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    return first != second and all(a >= b for a, b in zip(first, second, strict=True))
