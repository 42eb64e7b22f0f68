"""`Dependencies`: what every step of a schedule waits for, derived from the graph and the ranges of the steps.

Two steps depend on each other iff their nodes do and they share a token; and attention of a prompt's chunk waits for
the KV writes of all prefill tokens before its own, because the chunk may begin in an earlier range.
"""

from dataclasses import dataclass

from engine.operation import TokenKind
from engine.pipeline.graph import Node, OperationGraph
from engine.pipeline.nano_batch import Cut
from engine.pipeline.schedule import Lane, Schedule, Step


@dataclass(frozen=True, slots=True)
class PlacedStep:
    """A step of a schedule with its lane and its place among all steps, counted lane by lane."""

    index: int
    lane: Lane
    step: Step


@dataclass(frozen=True)
class Dependencies:
    """`waits[i]`: (step j, lag) pairs: step i of layer l runs after step j of layer l - lag."""

    steps: tuple[PlacedStep, ...]
    waits: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def of(cls, schedule: Schedule, graph: OperationGraph) -> "Dependencies":
        """Derive them; every step must name a node of the graph."""
        steps = tuple(PlacedStep(index, lane, step) for index, (lane, step) in enumerate(schedule.steps))
        of_node: dict[str, list[PlacedStep]] = {}
        for placed in steps:
            of_node.setdefault(placed.step.node, []).append(placed)
        waits: list[dict[tuple[int, int], None]] = [{} for _ in steps]
        for producer, consumer, lag in graph.edges:
            kinds = graph.by_name[producer].tokens, graph.by_name[consumer].tokens
            for earlier in of_node.get(producer, []):
                for later in of_node.get(consumer, []):
                    if _share_tokens(schedule.cut, earlier.step, later.step, kinds):
                        waits[later.index][earlier.index, lag] = None
        for writer, reader in graph.cache_edges:
            for earlier in of_node.get(writer, []):
                for later in of_node.get(reader, []):
                    if _writes_before(schedule.cut, earlier.step, later.step, graph.by_name[reader]):
                        waits[later.index][earlier.index, 0] = None
        return cls(steps, tuple(tuple(wait) for wait in waits))


def has_tokens(cut: Cut, start: int, stop: int, kind: TokenKind) -> bool:
    """Whether positions `start` to `stop` hold a token of this kind."""
    num_decodes = cut.decodes_before(stop) - cut.decodes_before(start)
    match kind:
        case TokenKind.DECODE:
            return num_decodes > 0
        case TokenKind.PREFILL:
            return stop - start > num_decodes
        case TokenKind.ALL:
            return stop > start


def kind_ranges(cut: Cut, start: int, stop: int, kind: TokenKind) -> list[tuple[int, int]]:
    """The ranges of positions from `start` to `stop` that hold tokens of this kind, as few as possible."""
    ranges: list[tuple[int, int]] = []
    for border, nano_batch in zip(cut.borders, cut.nano_batches, strict=False):
        middle, end = border + nano_batch.num_decodes, border + nano_batch.num_tokens
        first = max(start, middle if kind is TokenKind.PREFILL else border)
        last = min(stop, middle if kind is TokenKind.DECODE else end)
        if first < last and ranges and ranges[-1][1] == first:
            ranges[-1] = (ranges[-1][0], last)
        elif first < last:
            ranges.append((first, last))
    return ranges


def _share_tokens(cut: Cut, first: Step, second: Step, kinds: tuple[TokenKind, TokenKind]) -> bool:
    start, stop = max(first.start, second.start), min(first.stop, second.stop)
    special = set(kinds) - {TokenKind.ALL}
    if start >= stop or len(special) > 1:
        return False
    return has_tokens(cut, start, stop, special.pop() if special else TokenKind.ALL)


def _writes_before(cut: Cut, writer: Step, reader: Step, node: Node) -> bool:
    if not has_tokens(cut, reader.start, reader.stop, node.tokens):
        return False
    return has_tokens(cut, writer.start, min(writer.stop, reader.stop), TokenKind.PREFILL)
