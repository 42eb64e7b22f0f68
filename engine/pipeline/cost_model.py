"""`CostModel`: what the nodes of a graph cost on a device, alone and beside each other; the planner's only source.

Two implementations: `RooflineCosts` (a data sheet) and `MeasuredCosts` (a profile). Seconds throughout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.batch_shape import BatchShape
from engine.pipeline.graph import Node


@dataclass(frozen=True, slots=True)
class Mode:
    """With `share` tenths of the execution units a node runs at `speed` times its speed alone with all of them."""

    share: int
    speed: float


class CostModel(Protocol):
    """Prices of one graph's nodes."""

    @property
    def source(self) -> str:
        """Where the prices come from, for people: a measurement or a data sheet."""
        ...

    @property
    def shares_units(self) -> bool:
        """Whether operations on different lanes divide the execution units, so that their shares must fit in ten."""
        ...

    def seconds(self, node: Node, shape: BatchShape) -> float:
        """Time of `node` for the tokens of `shape`, alone on the device with all of its units."""
        ...

    def modes(self, node: Node) -> tuple[Mode, ...]:
        """The shares that a node can be given, ascending; one mode of all units where shares mean nothing."""
        ...

    def speed(self, node: Node, share: int, beside: Sequence[tuple[Node, int]]) -> float:
        """Speed relative to alone with all units, while (node, share)s run on the other lanes."""
        ...
