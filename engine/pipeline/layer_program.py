"""`LayerProgram`: the callables of one layer, bound to where their values lie, so that a nano-operation can be run.

Values that cross nodes lie in buffers of a row per token, in the order of the cut, so that a consumer whose operation
is cut differently reads one slice. Values inside a node are ordinary tensors. Nothing here knows lanes or time.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.operation import CacheUse, Operation, Resource, TokenKind
from engine.pipeline.graph import Node, OperationGraph
from engine.pipeline.stopwatch import Cost
from engine.pipeline.tracer import TracedLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundCall:
    """One call: `operation` None is an addition. `is_local` values are not needed outside the node."""

    name: str
    operation: Operation | None
    inputs: tuple[str, ...]
    is_local: bool
    cost: Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundNode:
    """A node with its calls, in order."""

    node: Node
    calls: tuple[BoundCall, ...]


@dataclass(frozen=True)
class LayerProgram:
    """A traced layer, ready to be run in pieces."""

    graph: OperationGraph
    nodes: Mapping[str, BoundNode]

    @classmethod
    def of(cls, traced: TracedLayer) -> "LayerProgram":
        """Bind every node of a traced layer."""
        nodes = {
            node.name: BoundNode(
                node=node,
                calls=tuple(
                    BoundCall(
                        name=call.name,
                        operation=traced.operations[call.name],
                        inputs=call.inputs,
                        is_local=call.name not in node.outputs,
                        cost=_cost(traced.operations[call.name]),
                    )
                    for call in node.calls
                ),
            )
            for node in traced.graph.nodes
        }
        return cls(traced.graph, nodes)


def shared_places(traced: TracedLayer) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Values that lie in another's place: those computed in place, and halves of a join, by the value they lie with.

    An operation in place may write over its input only where nobody else reads that.
    """
    num_readers: dict[str, int] = {}
    for node in traced.graph.nodes:
        for value in node.inputs:
            num_readers[value] = num_readers.get(value, 0) + 1
    in_place: dict[str, str] = {}
    joined: dict[str, str] = {}
    for node in traced.graph.nodes:
        for call in node.calls:
            operation = traced.operations[call.name]
            if operation is None:
                continue
            if operation.is_join:
                joined |= dict.fromkeys(call.inputs[1:], call.inputs[0])
            elif operation.is_in_place and num_readers.get(call.inputs[0]) == 1:
                in_place[call.name] = call.inputs[0]
    return in_place, joined


def _cost(operation: Operation | None) -> Cost:
    """What time spent in a call is counted as."""
    if operation is None:
        return Cost.OTHER
    if operation.resource is Resource.NETWORK:
        return Cost.NETWORK
    if operation.cache is CacheUse.READ:
        return Cost.ATTENTION
    if operation.resource is Resource.COMPUTE and operation.tokens is TokenKind.ALL:
        return Cost.GEMM
    return Cost.OTHER
