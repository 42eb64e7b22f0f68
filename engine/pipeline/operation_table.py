"""`OperationTable`: what each operation of a step asks of a whole group of devices, as in NanoFlow's table 2.

Its convention: operations, weights and what differs between ranks count for every rank, tokens that all ranks hold
alike count once; times are what the group's added-up peaks would take. `RooflineCosts` prices a single rank instead.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.batch_shape import BatchShape
from engine.operation import Resource, Work
from engine.pipeline.devices import DeviceSpec
from engine.pipeline.graph import Node
from engine.pipeline.tracer import TracedLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationRow:
    """One operation in all layers of a step: totals of the group, and the seconds each resource needs for them."""

    name: str
    flops: float
    memory_bytes: float
    network_bytes: float
    compute_seconds: float
    memory_seconds: float
    network_seconds: float

    @property
    def bound(self) -> Resource:
        """The resource that needs longest."""
        seconds = {
            Resource.COMPUTE: self.compute_seconds,
            Resource.MEMORY: self.memory_seconds,
            Resource.NETWORK: self.network_seconds,
        }
        return max(seconds, key=seconds.__getitem__)

    @property
    def seconds(self) -> float:
        """The time of the resource that needs longest."""
        return max(self.compute_seconds, self.memory_seconds, self.network_seconds)


@dataclass(frozen=True, slots=True)
class OperationTable:
    """The rows in the order of the layer."""

    rows: tuple[OperationRow, ...]

    @property
    def total(self) -> OperationRow:
        """All rows added up: were every resource busy all the time, the step would take `total.seconds`."""
        return OperationRow(
            name="total",
            flops=sum(row.flops for row in self.rows),
            memory_bytes=sum(row.memory_bytes for row in self.rows),
            network_bytes=sum(row.network_bytes for row in self.rows),
            compute_seconds=sum(row.compute_seconds for row in self.rows),
            memory_seconds=sum(row.memory_seconds for row in self.rows),
            network_seconds=sum(row.network_seconds for row in self.rows),
        )

    @property
    def bound(self) -> Resource:
        """The resource that bounds the step as a whole."""
        return self.total.bound

    @property
    def sequential_seconds(self) -> float:
        """One operation after the other, each at the peak of what bounds it."""
        return sum(row.seconds for row in self.rows)


def operation_table(
    traced: TracedLayer,
    shape: BatchShape,
    device: DeviceSpec,
    *,
    num_devices: int,
    num_layers: int,
    element_bytes: int,
    anchors_only: bool = False,
) -> OperationTable:
    """One row a node of a layer that a step repeats `num_layers` times.

    `anchors_only`: count of each node the one call that it is named after, as the paper does, and not the norms,
    additions and activations that run with it. Raises `ConfigError` where the device lacks a rate.
    """
    rows: list[OperationRow] = []
    for node in traced.graph.nodes:
        works = [
            work
            for name, work in _works(traced, node, shape, element_bytes)
            if not anchors_only or (name == node.name and traced.operations[name] is not None)
        ]
        if works or not anchors_only:
            work = sum(works, Work())
            rows.append(_row(node.name, work, device, num_devices, num_layers, element_bytes))
    return OperationTable(tuple(rows))


def _works(traced: TracedLayer, node: Node, shape: BatchShape, element_bytes: int) -> Iterator[tuple[str, Work]]:
    return ((call.name, work) for call, work in traced.call_work(node, shape, element_bytes))


def _row(
    name: str, work: Work, device: DeviceSpec, num_devices: int, num_layers: int, element_bytes: int
) -> OperationRow:
    flops, fp8_flops = work.flops * num_devices * num_layers, work.fp8_flops * num_devices * num_layers
    memory_bytes = ((work.weight_bytes + work.sharded_bytes) * num_devices + work.replicated_bytes) * num_layers
    network_bytes = work.network_bytes * num_devices * num_layers
    return OperationRow(
        name=name,
        flops=flops,
        memory_bytes=memory_bytes,
        network_bytes=network_bytes,
        compute_seconds=device.compute_seconds(flops / num_devices, element_bytes, fp8_flops / num_devices),
        memory_seconds=device.memory_seconds(memory_bytes / num_devices),
        network_seconds=device.network_seconds(network_bytes / num_devices),
    )
