"""The tracer: one layer of a plain PyTorch model becomes an `OperationGraph` and the callables behind its nodes.

`torch.fx` runs the layer's `forward` with `Operation`s as leaves. Small operations (norms, additions, activations)
then join the operation of weight that they feed, or else the one that feeds them, so that what a schedule places is
worth a lane's attention; operations that do nothing here are left out. There is no other rewriting.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from torch import Tensor, fx, nn

from engine.batch_shape import BatchShape
from engine.errors import ConfigError
from engine.operation import CacheUse, Operation, Resource, TokenKind, Work
from engine.pipeline.graph import LAYER_INPUT, Call, Node, OperationGraph

STEP_INPUTS = "step"
_FUNCTIONS: Mapping[Any, Callable[..., Tensor]] = {operator.add: operator.add}


@dataclass(frozen=True, slots=True)
class TracedLayer:
    """The graph of one layer, and for every call of it what to call: an `Operation`, or None for an addition."""

    graph: OperationGraph
    operations: Mapping[str, Operation | None]
    hidden_size: int

    def call_work(self, node: Node, shape: BatchShape, element_bytes: int) -> Iterator[tuple[Call, Work]]:
        """What one rank does for the tokens of `shape` in each call of this node; nothing where it computes none."""
        if _num_computed(node, shape) == 0:
            return
        for call in node.calls:
            found = self.operations[call.name]
            if found is None:  # an addition reads two hidden states and writes one
                num_elements = shape.num_tokens * self.hidden_size
                yield call, Work(flops=num_elements, replicated_bytes=3 * num_elements * element_bytes)
            else:
                yield call, found.work(shape, element_bytes)

    def work(self, node: Node, shape: BatchShape, element_bytes: int) -> Work:
        """What one rank does for the tokens of `shape` in this node."""
        return sum((work for _, work in self.call_work(node, shape, element_bytes)), Work())


def _num_computed(node: Node, shape: BatchShape) -> float:
    match node.tokens:
        case TokenKind.DECODE:
            return shape.num_decodes
        case TokenKind.PREFILL:
            return shape.num_prefills
        case TokenKind.ALL:
            return shape.num_tokens


class _OperationTracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(module, Operation) or super().is_leaf_module(module, module_qualified_name)


def trace_layer(layer: nn.Module, hidden_size: int) -> TracedLayer:
    """Trace `layer(hidden, step) -> hidden`; raises `ConfigError` for what is neither an Operation nor an addition."""
    traced = _OperationTracer().trace(layer)
    names = _names(traced)
    calls: list[Call] = []
    operations: dict[str, Operation | None] = {}
    output = ""
    for node in traced.nodes:
        if node.op == "output":
            output = names[node.args[0]]
        elif node.op != "placeholder":
            found = _operation(layer, node)
            inputs = tuple(names[argument] for argument in node.args if isinstance(argument, fx.Node))
            if len(inputs) != len(node.args) or node.kwargs:
                raise ConfigError(f"{_where(layer, node)}: pass operations their values by position and nothing else.")
            if found is not None and found.is_identity:
                names[node] = inputs[0]
                continue
            operations[names[node]] = found
            calls.append(Call(name=names[node], inputs=inputs, signature=_signature(found)))
    return TracedLayer(_fuse(calls, operations, output), operations, hidden_size)


def _names(traced: fx.Graph) -> dict[Any, str]:
    """The last part of a module's path where that is unique in the layer, else the whole path."""
    short: dict[str, int] = {}
    for node in traced.nodes:
        if node.op == "call_module":
            last = str(node.target).rpartition(".")[2]
            short[last] = short.get(last, 0) + 1
    names: dict[Any, str] = {}
    placeholders = [LAYER_INPUT, STEP_INPUTS]
    for node in traced.nodes:
        if node.op == "placeholder":
            names[node] = placeholders.pop(0)
        elif node.op == "call_module" and short[last := str(node.target).rpartition(".")[2]] == 1:
            names[node] = last
        else:
            names[node] = node.name
    return names


def _operation(layer: nn.Module, node: fx.Node) -> Operation | None:
    if node.op == "call_module":
        found = layer.get_submodule(str(node.target))
        if isinstance(found, Operation):
            return found
    if node.op == "call_function" and node.target in _FUNCTIONS:
        return None
    raise ConfigError(f"{_where(layer, node)} is neither an Operation nor an addition: make it an Operation.")


def _where(layer: nn.Module, node: fx.Node) -> str:
    return f"{type(layer).__name__}: {node.op} {node.target}"


def _signature(found: Operation | None) -> str:
    if found is None:
        return "add"
    shapes = [f"{name}{tuple(parameter.shape)}" for name, parameter in found.named_parameters()]
    return f"{type(found).__name__}({', '.join(shapes)})"


def _is_anchor(found: Operation | None) -> bool:
    """Whether an operation is worth a place of its own in a schedule."""
    return found is not None and (found.resource is not Resource.MEMORY or found.cache is CacheUse.READ)


def _fuse(calls: Sequence[Call], operations: Mapping[str, Operation | None], output: str) -> OperationGraph:
    """Give every small call to an anchor, and make a node of each anchor with what it was given.

    A call joins the node of the first that uses its value, else of the last that it reads, unless two nodes would then
    each wait for the other.
    """
    home = {call.name: call.name for call in calls}
    small = [call for call in calls if not _is_anchor(operations[call.name])]
    for call in reversed(small):
        consumer = next((other.name for other in calls if call.name in other.inputs), None)
        found = operations[call.name]
        if consumer is not None and (found is None or found.cache is not CacheUse.WRITE):
            _join(call, home[consumer], calls, operations, home)
    position = {call.name: index for index, call in enumerate(calls)}
    for call in small:
        producers = [home[name] for name in call.inputs if name in home]
        if home[call.name] == call.name and producers:
            _join(call, max(producers, key=position.__getitem__), calls, operations, home)
    groups: dict[str, list[Call]] = {}
    for call in calls:
        groups.setdefault(home[call.name], []).append(call)
    nodes = [_node(name, group, calls, operations, output) for name, group in groups.items()]
    return OperationGraph(_ordered(nodes), output)


def _join(
    call: Call,
    anchor: str,
    calls: Sequence[Call],
    operations: Mapping[str, Operation | None],
    home: dict[str, str],
) -> None:
    """Move a call, with what joined it, to the node of `anchor` if that computes all tokens on a usual lane."""
    found = operations[anchor]
    if found is None or found.resource is Resource.NETWORK or found.tokens is not TokenKind.ALL:
        return
    moved = {name: anchor if node == call.name else node for name, node in home.items()}
    if not _has_circle(calls, moved):
        home.update(moved)


def _has_circle(calls: Sequence[Call], home: Mapping[str, str]) -> bool:
    """Whether nodes made by `home` would wait for each other."""
    waits: TopologicalSorter[str] = TopologicalSorter()
    for call in calls:
        for value in call.inputs:
            if value in home and home[value] != home[call.name]:
                waits.add(home[call.name], home[value])
    try:
        waits.prepare()
    except CycleError:
        return True
    return False


def _node(
    name: str,
    group: Sequence[Call],
    calls: Sequence[Call],
    operations: Mapping[str, Operation | None],
    output: str,
) -> Node:
    inside = {call.name for call in group}
    members = [found for call in group if (found := operations[call.name]) is not None]
    used = {value for call in calls if call.name not in inside for value in call.inputs} | {output}
    anchor = operations[name]
    return Node(
        name=name,
        calls=tuple(group),
        inputs=tuple(
            dict.fromkeys(
                value for call in group for value in call.inputs if value not in inside and value != STEP_INPUTS
            )
        ),
        outputs=tuple(call.name for call in group if call.name in used),
        resource=Resource.MEMORY if anchor is None else anchor.resource,
        tokens=TokenKind.ALL if anchor is None else anchor.tokens,
        cache_writes=any(member.cache is CacheUse.WRITE for member in members),
        cache_reads=any(member.cache is CacheUse.READ for member in members),
    )


def _ordered(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """The nodes so that each comes after those whose values it reads; raises `ConfigError` for a circle."""
    ordered: list[Node] = []
    known = {LAYER_INPUT}
    waiting = list(nodes)
    while waiting:
        ready = next((node for node in waiting if known.issuperset(node.inputs)), None)
        if ready is None:
            raise ConfigError(f"the operations {', '.join(node.name for node in waiting)} depend on each other.")
        waiting.remove(ready)
        ordered.append(ready)
        known.update(ready.outputs)
    return tuple(ordered)
