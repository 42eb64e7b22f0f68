"""`LayerProgram`: the callables of one layer, bound to where their values lie, so that a nano-operation can be run.

Values that cross nodes lie in buffers of a row per token, in the order of the cut, so that a consumer whose operation
is cut differently reads one slice. Values inside a node are ordinary tensors. Nothing here knows lanes or time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """What of `plain` lies behind the layer's last use of the cache: each row by itself, so some of them do.

    Node number `start` begins it, with `joins` of what was attended; `nodes` are the others, which take `inputs`.
    """

    start: int
    joins: BoundNode
    nodes: tuple[BoundNode, ...]
    inputs: frozenset[str]

    @classmethod
    def of(cls, plain: Sequence[BoundNode]) -> "Tail":
        """The tail of a layer's nodes."""
        operations = [[call.operation for call in bound.calls] for bound in plain]
        uses = [any(each is not None and each.cache is not CacheUse.NONE for each in node) for node in operations]
        start = len(uses) - uses[::-1].index(True)
        first = plain[start]
        num_joins = next(index for index, piece in enumerate(first.pieces) if not is_join(piece))
        nodes = (replace(first, pieces=first.pieces[num_joins:]), *plain[start + 1 :])
        inputs = frozenset(value for bound in nodes for piece in bound.pieces for value in piece.values)
        return cls(start=start, joins=replace(first, pieces=first.pieces[:num_joins]), nodes=nodes, inputs=inputs)


def is_join(piece: BoundCall | Chain) -> bool:
    """Whether it puts what was computed of decodes and of prefills into one tensor."""
    return isinstance(piece, BoundCall) and piece.operation is not None and piece.operation.is_join


@dataclass(frozen=True)
class LayerProgram:
    """A traced layer, ready to be run in pieces; `plain` are the nodes of the sequential schedule in its order, those
    joined that nothing comes between: they need not be told apart where nothing is cut.
    """

    traced: TracedLayer
    nodes: Mapping[str, BoundNode]
    plain: tuple[BoundNode, ...]

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
        return cls(traced, nodes, tuple(_joined_nodes(traced.graph, nodes)))

    @property
    def graph(self) -> OperationGraph:
        """What it computes."""
        return self.traced.graph

    @cached_property
    def tail(self) -> Tail:
        """Its part for which rows need not all be computed."""
        return Tail.of(self.plain)

    @cached_property
    def in_place(self) -> Mapping[str, str]:
        """Values that are computed in another's place, by that one; see `shared_places`."""
        return shared_places(self.traced)[0]

    def kernels(self, dtype: str, block_size: int) -> list[Kernel]:
        """What would be compiled for it; see `plan_chains`."""
        plans = (plan for node in self._compilable for plan in self._plans(node, dtype, block_size))
        return [plan.kernel for plan in plans if plan.kernel is not None and _pays(plan)]

    def compiled(
        self, kernels: CompiledKernels, dtype: str, block_size: int, known: dict[Kernel, ProductShare | None]
    ) -> "LayerProgram":
        """The same with those kernels that there are; `known` is what was measured of them, for other layers to use."""
        found: dict[str, BoundNode] = {}
        for bound in self._compilable:
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
            found[bound.node.name] = BoundNode(node=bound.node, calls=bound.calls, pieces=tuple(pieces))
        nodes = {name: found.get(name, bound) for name, bound in self.nodes.items()}
        return LayerProgram(self.traced, nodes, tuple(found[bound.node.name] for bound in self.plain))

    @property
    def _compilable(self) -> list[BoundNode]:
        """Plain nodes; where there is a network to overlap with, nodes that a plan places by themselves, too."""
        has_network = any(node.resource is Resource.NETWORK for node in self.graph.nodes)
        plain = {bound.node.name for bound in self.plain}
        return [*self.plain, *(bound for name, bound in self.nodes.items() if has_network and name not in plain)]

    def _plans(self, bound: BoundNode, dtype: str, block_size: int) -> Iterator[ChainPlan]:
        outputs = bound.node.outputs
        hidden_size = self.traced.hidden_size
        return plan_chains(bound.calls, outputs, dtype=dtype, block_size=block_size, hidden_size=hidden_size)


def _joined_nodes(graph: OperationGraph, nodes: Mapping[str, BoundNode]) -> Iterator[BoundNode]:
    """The nodes of the sequential schedule; neighbours that compute all tokens are one. Of a collective that can be
    placed in several ways it has the first.
    """
    chosen = [nodes[node.name] for node in graph.nodes if node.branch not in graph.branches[1:]]
    for _, group in groupby(enumerate(chosen), key=lambda item: -1 if _is_joinable(item[1].node) else item[0]):
        bounds = [bound for _, bound in group]
        yield bounds[0] if len(bounds) == 1 else _joined_node(graph, bounds)


def _is_joinable(node: Node) -> bool:
    return node.tokens is TokenKind.ALL and node.resource is not Resource.NETWORK


def _joined_node(graph: OperationGraph, bounds: Sequence[BoundNode]) -> BoundNode:
    members = {bound.node.name for bound in bounds}
    computed = {value for bound in bounds for value in bound.node.outputs}
    used = {value for node in graph.nodes if node.name not in members for value in node.inputs} | {graph.output}
    calls = tuple(call for bound in bounds for call in bound.calls)
    node = Node(
        name="+".join(bound.node.name for bound in bounds),
        calls=tuple(call for bound in bounds for call in bound.node.calls),
        inputs=tuple(dict.fromkeys(value for bound in bounds for value in bound.node.inputs if value not in computed)),
        outputs=tuple(value for bound in bounds for value in bound.node.outputs if value in used),
        resource=Resource.COMPUTE,
        cache_writes=any(bound.node.cache_writes for bound in bounds),
    )
    return BoundNode(node=node, calls=calls, pieces=calls)


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
