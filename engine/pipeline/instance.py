"""`Instance`: a layer, cut in one way, as a scheduling problem: nano-operations with times, lanes and precedences."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from engine.batch_shape import BatchShape
from engine.operation import TokenKind
from engine.pipeline.cost_model import CostModel
from engine.pipeline.dependencies import Dependencies
from engine.pipeline.graph import Node, OperationGraph
from engine.pipeline.nano_batch import Cut
from engine.pipeline.partition import NodeRange, Partition
from engine.pipeline.placement import lane_of
from engine.pipeline.schedule import ALL_UNITS, Lane, Schedule, Step

_UNREACHABLE = 1 << 20


@dataclass(frozen=True, slots=True)
class NanoOperation:
    """A node on a range of positions. `seconds` is its time alone with all execution units."""

    node: Node
    nano_batch: int
    start: int
    stop: int
    lane: Lane
    seconds: float

    def step(self, share: int = ALL_UNITS, delay: int = 0) -> Step:
        """The step of a schedule that runs it."""
        return Step(self.node.name, self.start, self.stop, share, delay)

    def __str__(self) -> str:
        return f"{self.node.name}[{self.start}:{self.stop}]"


@dataclass(frozen=True)
class Instance:
    """`edges`: (i, j, lag): nano-operation j of layer l runs after i of layer l - lag."""

    cut: Cut
    operations: tuple[NanoOperation, ...]
    edges: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(
        cls,
        partition: Partition,
        graph: OperationGraph,
        costs: CostModel,
        shape: BatchShape,
        lanes: Collection[Lane],
    ) -> "Instance":
        """Price the nano-operations of a partition and derive what each waits for."""
        by_lane: dict[Lane, list[NodeRange]] = {lane: [] for lane in Lane}
        for placed in partition.ranges(graph, lanes):
            by_lane[lane_of(placed.node, lanes)].append(placed)
        operations = tuple(
            NanoOperation(
                placed.node,
                placed.nano_batch,
                placed.start,
                placed.stop,
                lane,
                costs.seconds(placed.node, part_of(shape, partition.cut, placed.node, placed.start, placed.stop)),
            )
            for lane, ranges in by_lane.items()
            for placed in ranges
        )
        steps = {lane: tuple(found.step() for found in operations if found.lane is lane) for lane in by_lane}
        waits = Dependencies.of(Schedule(partition.cut, steps), graph).waits
        return cls(partition.cut, operations, tuple((i, j, lag) for j, wait in enumerate(waits) for i, lag in wait))

    @property
    def lanes(self) -> Mapping[Lane, list[int]]:
        """The nano-operations of each lane that has any."""
        found: dict[Lane, list[int]] = {}
        for index, operation in enumerate(self.operations):
            found.setdefault(operation.lane, []).append(index)
        return found

    def places_in(self, mirrored: "Instance") -> list[int]:
        """For every nano-operation of `mirrored`, which has the nano-batches in reverse order, the same one here."""
        place_of = {self._name(index): index for index in range(len(self.operations))}
        last = len(self.cut.nano_batches) - 1
        names = [mirrored._name(index) for index in range(len(mirrored.operations))]
        return [place_of[node, last - nano_batch, offset] for node, nano_batch, offset in names]

    def _name(self, index: int) -> tuple[str, int, int]:
        operation = self.operations[index]
        return operation.node.name, operation.nano_batch, operation.start - self.cut.borders[operation.nano_batch]

    @cached_property
    def chain_edges(self) -> tuple[tuple[int, int, int], ...]:
        """The edges inside a nano-batch. Those between two (KV writes) only fix how far one runs ahead of the other."""
        return tuple(
            (i, j, lag) for i, j, lag in self.edges if self.operations[i].nano_batch == self.operations[j].nano_batch
        )

    @cached_property
    def last(self) -> frozenset[int]:
        """The nano-operations that the next layer waits for."""
        return frozenset(i for i, _, lag in self.edges if lag)

    @cached_property
    def first(self) -> frozenset[int]:
        """The nano-operations that begin a layer."""
        fed = {j for _, j, lag in self.edges if not lag}
        return frozenset(range(len(self.operations))) - fed

    @cached_property
    def exclusive(self) -> frozenset[tuple[int, int]]:
        """Pairs (both orders) that cannot run together in any run: on one lane, or each waits for the other in turn."""
        size = len(self.operations)
        lag_of = [[0 if i == j else _UNREACHABLE for j in range(size)] for i in range(size)]
        for i, j, lag in self.chain_edges:
            lag_of[i][j] = min(lag_of[i][j], lag)
        for middle, via in enumerate(lag_of):
            for row in lag_of:
                if (reach := row[middle]) < _UNREACHABLE:
                    row[:] = [min(old, reach + new) for old, new in zip(row, via, strict=True)]
        return frozenset(
            (i, j)
            for i in range(size)
            for j in range(size)
            if i != j and (self.operations[i].lane is self.operations[j].lane or lag_of[i][j] + lag_of[j][i] <= 1)
        )


def part_of(shape: BatchShape, cut: Cut, node: Node, start: int, stop: int) -> BatchShape:
    """The tokens of positions `start` to `stop` that the node computes."""
    num_decodes = cut.decodes_before(stop) - cut.decodes_before(start)
    num_prefills = stop - start - num_decodes
    return shape.part(
        0 if node.tokens is TokenKind.PREFILL else num_decodes,
        0 if node.tokens is TokenKind.DECODE else num_prefills,
    )


def time_unit(operations: Sequence[NanoOperation], least_units: int) -> float:
    """The longest of 1, 2 and 5 times a power of ten seconds of which the nano-operations together take so many."""
    total = sum(operation.seconds for operation in operations)
    exponent = -45
    while _unit(exponent + 1) * least_units <= total:
        exponent += 1
    return _unit(exponent)


def _unit(exponent: int) -> float:
    return float((1, 2, 5)[exponent % 3] * 10.0 ** (exponent // 3))
