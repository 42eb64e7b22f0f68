"""`Partition`: how one layer is cut into nano-operations: the nano-batches, their branches, the pieces of the head.

The family that the planner searches: one or two nano-batches with any mix of decodes and prefill tokens on a grid;
every node in one piece per nano-batch, except those of the head, which may be halved there: the writers of the KV
cache, and the readers of it that run on another lane (the paper cuts the projection and decode attention in four).
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import product

from engine.operation import TokenKind
from engine.pipeline.graph import Node, OperationGraph
from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.placement import lane_of
from engine.pipeline.schedule import Lane


@dataclass(frozen=True, slots=True)
class NodeRange:
    """A node on positions `start` to `stop` of a nano-batch."""

    node: Node
    nano_batch: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """`branches`: the way of placing a collective, per nano-batch; pieces are counted per nano-batch."""

    cut: Cut
    branches: tuple[str | None, ...]
    num_write_pieces: int = 1
    num_read_pieces: int = 1
    multiple: int = 1

    @property
    def mirrored(self) -> "Partition":
        """The same nano-batches in reverse order."""
        return replace(self, cut=Cut(self.cut.nano_batches[::-1]), branches=self.branches[::-1])

    def ranges(self, graph: OperationGraph, lanes: Collection[Lane]) -> Iterator[NodeRange]:
        """The nano-operations, nano-batch after nano-batch; of each node only where it has tokens."""
        write_lanes = {lane_of(node, lanes) for node in graph.nodes if node.cache_writes}
        for index, nano_batch in enumerate(self.cut.nano_batches):
            first, last = self.cut.borders[index], self.cut.borders[index + 1]
            border = first + nano_batch.num_decodes
            for node in graph.nodes:
                if node.branch not in (None, self.branches[index]):
                    continue
                start = border if node.tokens is TokenKind.PREFILL else first
                stop = border if node.tokens is TokenKind.DECODE else last
                num_pieces = 1
                if node.cache_writes:
                    num_pieces = self.num_write_pieces
                elif node.cache_reads and lane_of(node, lanes) not in write_lanes:
                    num_pieces = self.num_read_pieces
                for piece in _pieces(start, stop, num_pieces, self.multiple):
                    yield NodeRange(node, index, *piece)


def partitions(
    graph: OperationGraph, lanes: Collection[Lane], num_decodes: int, num_prefills: int, multiple: int
) -> Iterator[Partition]:
    """The whole family for a batch; of two partitions that differ only in the order of nano-batches, one."""
    writers = {lane_of(node, lanes) for node in graph.nodes if node.cache_writes}
    can_overlap = any(node.cache_reads and lane_of(node, lanes) not in writers for node in graph.nodes)
    pieces = list(product((1, 2), (1, 2))) if can_overlap else [(1, 1)]
    seen: set[object] = set()
    for cut in cuts(num_decodes, num_prefills, multiple):
        for branches in product(graph.branches or (None,), repeat=len(cut.nano_batches)):
            for num_write_pieces, num_read_pieces in pieces:
                partition = Partition(
                    cut=cut,
                    branches=branches,
                    num_write_pieces=num_write_pieces,
                    num_read_pieces=num_read_pieces,
                    multiple=multiple,
                )
                key = _key(partition, graph, lanes)
                if key not in seen:
                    seen.add(key)
                    yield partition


def cuts(num_decodes: int, num_prefills: int, multiple: int) -> Iterator[Cut]:
    """The whole batch, and all pairs of nano-batches of which the first is a multiple of `multiple` tokens.

    Decodes are dealt in multiples too, or all to one nano-batch, or in proportion.
    """
    num_tokens = num_decodes + num_prefills
    yield Cut((NanoBatch(num_decodes, num_prefills),))
    for size in range(multiple, num_tokens, multiple):
        choices = {*range(0, num_decodes, multiple), num_decodes, round(size * num_decodes / num_tokens)}
        for decodes in sorted(choices):
            if 0 <= size - decodes <= num_prefills:
                first = NanoBatch(decodes, size - decodes)
                yield Cut((first, NanoBatch(num_decodes - decodes, num_prefills - first.num_prefills)))


def _pieces(start: int, stop: int, num_pieces: int, multiple: int) -> list[tuple[int, int]]:
    if stop <= start:
        return []
    half = -(-(stop - start) // (2 * multiple)) * multiple
    if num_pieces == 1 or half >= stop - start:
        return [(start, stop)]
    return [(start, start + half), (start + half, stop)]


def _key(partition: Partition, graph: OperationGraph, lanes: Collection[Lane]) -> object:
    """Equal for partitions whose nano-batches are the same in another order, and where halving changes nothing."""
    sizes: list[list[object]] = [[partition.cut.nano_batches[i], b] for i, b in enumerate(partition.branches)]
    for placed in partition.ranges(graph, lanes):
        sizes[placed.nano_batch].append((placed.node.name, placed.stop - placed.start))
    return frozenset((str(size), sum(other == size for other in sizes)) for size in sizes)
