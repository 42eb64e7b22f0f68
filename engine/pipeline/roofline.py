"""`RooflineCosts`: the `CostModel` where no measurement is at hand, from a device's data sheet.

A call takes as long as the resource that it keeps busy longest, at that resource's peak: no kernel is that good, so
these are lower limits and their ratios say more than their sums. Calls of a node run one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.batch_shape import BatchShape
from engine.operation import Work
from engine.pipeline.cost_model import Mode
from engine.pipeline.devices import DeviceSpec
from engine.pipeline.graph import Node
from engine.pipeline.schedule import ALL_UNITS
from engine.pipeline.tracer import TracedLayer
from engine.pipeline.unit_sharing import UnitSharing


@dataclass(frozen=True)
class RooflineCosts:
    """Prices of one rank's nodes; `traced` is its share of a layer on `num_devices`.

    `sharing` takes the place of the device's own table of shares and speeds, if it has one.
    """

    traced: TracedLayer
    device: DeviceSpec
    num_devices: int
    element_bytes: int
    sharing: UnitSharing | None = None

    @property
    def source(self) -> str:
        """Where the prices come from, for people."""
        table = self._sharing
        shares = "" if table is None else f"; speeds of shared units from {table.name}"
        return f"estimate, nothing ran: {self.num_devices} x {self.device.name} ({self.device.source}){shares}"

    @property
    def shares_units(self) -> bool:
        """Whether operations on different lanes divide the execution units: on GPUs."""
        return self._sharing is not None

    def seconds(self, node: Node, shape: BatchShape) -> float:
        """Time of `node` for the tokens of `shape`, alone on the device with all of its units; nothing for none."""
        return sum(
            roofline_seconds(work, self.device, self.element_bytes)
            for _, work in self.traced.call_work(node, shape, self.element_bytes)
        )

    def modes(self, node: Node) -> tuple[Mode, ...]:
        """The shares that a node can be given, by what it strains; all units where shares mean nothing."""
        table = self._sharing
        if table is None:
            return (Mode(ALL_UNITS, 1.0),)
        return tuple(Mode(share, speed) for share, speed in enumerate(table.speeds(node.resource), 1))

    def speed(self, node: Node, share: int, beside: Sequence[tuple[Node, int]]) -> float:
        """Speed with `share` tenths of the units: what runs beside it matters only through the units that it takes."""
        table = self._sharing
        return 1.0 if table is None else table.speeds(node.resource)[share - 1]

    @property
    def _sharing(self) -> UnitSharing | None:
        return self.device.sharing if self.device.sharing is None else self.sharing or self.device.sharing


def roofline_seconds(work: Work, device: DeviceSpec, element_bytes: int) -> float:
    """The longest of the times that computing, moving and sending take one rank."""
    return max(
        device.compute_seconds(work.flops, element_bytes, work.fp8_flops),
        device.memory_seconds(work.memory_bytes),
        device.network_seconds(work.network_bytes),
    )
