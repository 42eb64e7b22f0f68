"""`OperationGraph`: what one layer of a model computes, as nodes that a schedule can place.

A `Node` is one operation of weight together with the small ones that always run right before or after it, on the same
tokens and the same lane. Nothing here knows torch, costs or time.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from engine.operation import Resource, TokenKind

LAYER_INPUT = "hidden"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One traced operation: `name` is also the name of its value, `inputs` are values, `signature` tells its shape."""

    name: str
    inputs: tuple[str, ...]
    signature: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Calls that run back to back. `inputs` are values of other nodes or `LAYER_INPUT`; `outputs` are used outside.

    `branch` names the way of placing a collective that this node belongs to; None: it belongs to every schedule.
    """

    name: str
    calls: tuple[Call, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    resource: Resource
    tokens: TokenKind = TokenKind.ALL
    cache_writes: bool = False
    cache_reads: bool = False
    branch: str | None = None


@dataclass(frozen=True)
class OperationGraph:
    """The nodes of one layer in an order that respects their dependencies. `output` is the value the next one gets."""

    nodes: tuple[Node, ...]
    output: str

    @cached_property
    def by_name(self) -> Mapping[str, Node]:
        """The nodes by their names."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def producers(self) -> Mapping[str, tuple[str, ...]]:
        """For every value, the nodes that produce it: one, or one per branch."""
        found: dict[str, tuple[str, ...]] = {}
        for node in self.nodes:
            for value in node.outputs:
                found[value] = (*found.get(value, ()), node.name)
        return found

    @cached_property
    def edges(self) -> tuple[tuple[str, str, int], ...]:
        """(producer, consumer, layers later): where token ranges intersect, the consumer waits for the producer."""
        found = dict.fromkeys(
            (producer, node.name, 0)
            for node in self.nodes
            for value in node.inputs
            if value != LAYER_INPUT
            for producer in self.producers[value]
            if self._are_compatible(producer, node.name)
        )
        found |= dict.fromkeys(
            (producer, node.name, 1)
            for node in self.nodes
            if LAYER_INPUT in node.inputs
            for producer in self.producers[self.output]
        )
        return tuple(found)

    @cached_property
    def cache_edges(self) -> tuple[tuple[str, str], ...]:
        """(writer, reader): a read of prefill tokens waits for the writes of the same and of all earlier tokens.

        Decodes need only their own token's write, which is one of `edges`; a chunk of a prompt may reach back into an
        earlier range.
        """
        writers = [node.name for node in self.nodes if node.cache_writes]
        readers = [node.name for node in self.nodes if node.cache_reads and node.tokens is not TokenKind.DECODE]
        return tuple((writer, reader) for writer in writers for reader in readers)

    @cached_property
    def branches(self) -> tuple[str, ...]:
        """The ways of placing a collective, of which every token takes one; empty where there is one way only."""
        return tuple(dict.fromkeys(node.branch for node in self.nodes if node.branch is not None))

    @cached_property
    def signature(self) -> str:
        """Names the computation: equal for layers that one schedule can serve."""
        text = repr([(node.name, node.calls, node.branch) for node in self.nodes]) + self.output
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _are_compatible(self, producer: str, consumer: str) -> bool:
        branches = {self.by_name[producer].branch, self.by_name[consumer].branch} - {None}
        return len(branches) < 2
