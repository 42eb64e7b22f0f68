"""What the planner's tests plan: layers made by hand, and prices on straight lines.

The figures are those of the paper's table 2 for Llama-2-70B on eight A100 (NanoFlow), per layer, in microseconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.batch_shape import BatchShape
from engine.operation import Resource, TokenKind
from engine.pipeline.cost_model import Mode
from engine.pipeline.graph import Call, Node, OperationGraph
from engine.pipeline.schedule import ALL_UNITS


def node(
    name: str,
    inputs: Sequence[str],
    resource: Resource,
    tokens: TokenKind = TokenKind.ALL,
    *,
    output: str | None = None,
    branch: str | None = None,
    cache_writes: bool = False,
    cache_reads: bool = False,
) -> Node:
    """A node of one call; its value has its name, or `output`."""
    value = output or name
    return Node(
        name=name,
        calls=(Call(name=value, inputs=tuple(inputs), signature=name),),
        inputs=tuple(inputs),
        outputs=(value,),
        resource=resource,
        tokens=tokens,
        branch=branch,
        cache_writes=cache_writes,
        cache_reads=cache_reads,
    )


def layer(*, has_network: bool = True, has_branches: bool = False) -> OperationGraph:
    """A dense layer as the tracer gives it, on several devices or one, with both ways to place a collective or one."""
    compute, network = Resource.COMPUTE, Resource.NETWORK
    reduce = "reduce" if has_branches else None
    nodes = [
        node("qkv", ["hidden"], compute, cache_writes=True),
        node("decode", ["qkv"], Resource.MEMORY, TokenKind.DECODE, cache_reads=True),
        node("prefill", ["qkv"], compute, TokenKind.PREFILL, cache_reads=True),
        node("o", ["decode", "prefill"], compute, branch=reduce),
    ]
    if has_network:
        nodes.append(node("o_reduce", ["o"], network, output="attention", branch=reduce))
    if has_branches:
        nodes += [
            node("gather_heads", ["decode", "prefill"], network, branch="gather"),
            node("o_columns", ["gather_heads"], compute, branch="gather"),
            node("gather_columns", ["o_columns"], network, output="attention", branch="gather"),
        ]
    nodes += [
        node("up", ["hidden", "attention" if has_network else "o"], compute),
        node("down", ["up"], compute),
    ]
    if has_network:
        nodes += [
            node("down_reduce", ["down"], network),
            node("residual", ["up", "down_reduce"], Resource.MEMORY),
        ]
    return OperationGraph(tuple(nodes), nodes[-1].name)


def _line(fixed: float, total: float, tokens: int) -> tuple[float, float]:
    return fixed, (total - fixed) / tokens


TABLE_2: Mapping[str, tuple[float, float]] = {
    "qkv": _line(42.9, 201, 2048),
    "decode": _line(36, 445, 1280),
    "prefill": _line(20, 57, 768),
    "o": _line(19.7, 200, 2048),
    "o_columns": _line(19.7, 200, 2048),
    "o_reduce": (33.7, 0.1298),
    "gather_heads": (13.5, 0.0773),
    "gather_columns": (13.5, 0.0773),
    "up": _line(37, 874, 2048),
    "down": _line(5, 437, 2048),
    "down_reduce": (33.7, 0.1298),
    "residual": (0, 0),
}
PAPER_SPEEDS: Mapping[Resource, Sequence[float]] = {
    Resource.COMPUTE: (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1),
    Resource.MEMORY: (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.775, 0.85, 0.95, 1),
    Resource.NETWORK: (0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 1, 1),
}
PAPER_SHAPE = BatchShape(num_decodes=1280, num_prefills=768)


@dataclass(frozen=True)
class LineCosts:
    """A `CostModel`: fixed microseconds and microseconds per token. Shares by a table, or none.

    `beside_network` is the speed of everything while a collective flies, `network_beside` that of the collective.
    """

    lines: Mapping[str, tuple[float, float]] = field(default_factory=lambda: TABLE_2)
    table: Mapping[Resource, Sequence[float]] | None = None
    beside_network: float = 1.0
    network_beside: float = 1.0
    source: str = "made up"

    @property
    def shares_units(self) -> bool:
        return self.table is not None

    def seconds(self, node: Node, shape: BatchShape) -> float:
        fixed, per_token = self.lines[node.name]
        return (fixed + per_token * shape.num_tokens) * 1e-6

    def modes(self, node: Node) -> tuple[Mode, ...]:
        if self.table is None:
            return (Mode(ALL_UNITS, 1.0),)
        return tuple(Mode(share, speed) for share, speed in enumerate(self.table[node.resource], 1))

    def speed(self, node: Node, share: int, beside: Sequence[tuple[Node, int]]) -> float:
        alone = 1.0 if self.table is None else self.table[node.resource][share - 1]
        if node.resource is Resource.NETWORK:
            return alone * (self.network_beside if beside else 1)
        flies = any(other.resource is Resource.NETWORK for other, _ in beside)
        return alone * (self.beside_network if flies else 1)
