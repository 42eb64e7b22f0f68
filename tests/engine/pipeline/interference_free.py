"""`InterferenceFree`: the prices of another cost model as if lanes did not disturb each other.

What the first stage of the paper's search assumes (NanoFlow, section 4.1.2). No device behaves so; a plan for it shows
what dependencies alone allow, and how much of the rest is interference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.batch_shape import BatchShape
from engine.pipeline.cost_model import CostModel, Mode
from engine.pipeline.graph import Node
from engine.pipeline.schedule import ALL_UNITS


@dataclass(frozen=True, slots=True)
class InterferenceFree:
    """A `CostModel`: `costs` without interference."""

    costs: CostModel

    @property
    def source(self) -> str:
        """Where the prices come from."""
        return f"{self.costs.source}, without interference"

    @property
    def shares_units(self) -> bool:
        """Every lane has all the units."""
        return False

    def seconds(self, node: Node, shape: BatchShape) -> float:
        """Time alone on the device."""
        return self.costs.seconds(node, shape)

    def modes(self, node: Node) -> tuple[Mode, ...]:
        """All of the units."""
        return (Mode(ALL_UNITS, 1.0),)

    def speed(self, node: Node, share: int, beside: Sequence[tuple[Node, int]]) -> float:
        """As alone, whatever runs beside."""
        return 1.0
