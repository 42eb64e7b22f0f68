"""`LayerProgram`: the callables of one layer, bound to where their values lie, so that a nano-operation can be run.

Values that cross nodes lie in buffers of a row per token, in the order of the cut, so that a consumer whose operation
is cut differently reads one slice. Values inside a node are ordinary tensors. Nothing here knows lanes or time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from engine.kernels.compiled import CompiledKernels
from engine.kernels.kernel import Kernel
from engine.operation import CacheUse, Operation, Resource, TokenKind
from engine.pipeline.chain import BoundCall, Chain, ChainPlan, plan_chains
from engine.pipeline.graph import Node, OperationGraph
from engine.pipeline.product_share import ProductShare
from engine.pipeline.stopwatch import Cost
from engine.pipeline.tracer import TracedLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundNode:
    """A node with its calls, in order, and what computes them."""

    node: Node
    calls: tuple[BoundCall, ...]
    pieces: tuple[BoundCall | Chain, ...]


@dataclass(frozen=True)
class LayerProgram:
    """A traced layer, ready to be run in pieces."""

    traced: TracedLayer
    nodes: Mapping[str, BoundNode]

    @classmethod
    def of(cls, traced: TracedLayer) -> "LayerProgram":
        """Bind every node of a traced layer; each call is a piece of its own."""
        nodes: dict[str, BoundNode] = {}
        for node in traced.graph.nodes:
            calls = tuple(
                BoundCall(
                    name=call.name,
                    operation=traced.operations[call.name],
                    inputs=call.inputs,
                    cost=_cost(traced.operations[call.name]),
                )
                for call in node.calls
            )
            nodes[node.name] = BoundNode(node=node, calls=calls, pieces=calls)
        return cls(traced, nodes)

    @property
    def graph(self) -> OperationGraph:
        """What it computes."""
        return self.traced.graph

    def kernels(self, dtype: str, block_size: int) -> list[Kernel]:
        """What would be compiled for it; see `plan_chains`."""
        plans = (plan for node in self.nodes.values() for plan in self._plans(node, dtype, block_size))
        return [plan.kernel for plan in plans if plan.kernel is not None and _pays(plan)]

    def compiled(
        self, kernels: CompiledKernels, dtype: str, block_size: int, known: dict[Kernel, ProductShare | None]
    ) -> "LayerProgram":
        """The same with those kernels that there are; `known` is what was measured of them, for other layers to use."""
        nodes: dict[str, BoundNode] = {}
        for name, bound in self.nodes.items():
            pieces: list[BoundCall | Chain] = []
            for plan in self._plans(bound, dtype, block_size):
                loaded = kernels.load(plan.kernel) if plan.kernel is not None and _pays(plan) else None
                if loaded is None:
                    pieces += plan.calls
                elif len(plan.calls) > 1:
                    pieces.append(plan.bound(loaded, known))
                else:
                    (call,) = plan.calls
                    if call.operation is not None:
                        call.operation.compiled = loaded
                    pieces.append(call)
            nodes[name] = BoundNode(node=bound.node, calls=bound.calls, pieces=tuple(pieces))
        return LayerProgram(self.traced, nodes)

    def _plans(self, bound: BoundNode, dtype: str, block_size: int) -> Iterator[ChainPlan]:
        outputs = bound.node.outputs
        hidden_size = self.traced.hidden_size
        return plan_chains(bound.calls, outputs, dtype=dtype, block_size=block_size, hidden_size=hidden_size)


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


def _pays(plan: ChainPlan) -> bool:
    """Whether a kernel of its own does better than the calls: an addition or a product alone has nothing to be joined
    with.
    """
    return len(plan.calls) > 1 or (plan.calls[0].cost is not Cost.GEMM and plan.calls[0].operation is not None)


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
