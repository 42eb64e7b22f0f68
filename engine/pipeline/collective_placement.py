"""The other way to place the collective of attention: gather before the projection instead of reducing after it.

A row-parallel projection leaves partial sums that an all-reduce adds up: O -> AR. With the same weight cut by columns,
every rank gathers all heads, computes its columns of the result, and gathers those: AG -> O -> AG (NanoFlow, section
4.1.2). Both send the same bytes; the first gather is on its way before the projection, which a pipeline can use.
`with_gather_branch` adds the second way as a branch that a planner may choose for each nano-batch.

For planning: the operations it adds have shapes and no weights, so that costs can be derived from them. A node that has
an output of another name than its calls gives it the value of its last call.
"""

from dataclasses import replace

import torch

from engine.layers.collective import AllGather, AllReduce
from engine.layers.linear import ColumnParallelLinear, RowParallelLinear
from engine.operation import Operation, Resource
from engine.pipeline.graph import Call, Node, OperationGraph
from engine.pipeline.tracer import TracedLayer

REDUCE, GATHER = "reduce", "gather"
GATHER_HEADS, GATHER_COLUMNS = "gather_heads", "gather_columns"


def with_gather_branch(traced: TracedLayer) -> TracedLayer:
    """Both ways for the first all-reduce that a projection of attention feeds; `traced` itself if there is none."""
    for node in traced.graph.nodes:
        reduce = traced.operations[node.calls[-1].name]
        if not isinstance(reduce, AllReduce) or len(node.calls) > 1:
            continue
        (producer,) = traced.graph.producers[node.inputs[0]]
        projection = traced.graph.by_name[producer]
        product = traced.operations[projection.calls[-1].name]
        if isinstance(product, RowParallelLinear) and _is_fed_by_attention(projection, traced.graph):
            return _with_branch(traced, projection, product, node, reduce)
    return traced


def _is_fed_by_attention(node: Node, graph: OperationGraph) -> bool:
    producers = [graph.by_name[name] for value in node.inputs for name in graph.producers.get(value, ())]
    return bool(producers) and all(producer.cache_reads for producer in producers)


def _with_branch(
    traced: TracedLayer, projection: Node, product: RowParallelLinear, node: Node, reduce: AllReduce
) -> TracedLayer:
    tensor_parallel = reduce.tensor_parallel
    num_outputs, num_shard_inputs = product.weight.shape
    num_inputs = num_shard_inputs * tensor_parallel.size
    columns_name = f"{projection.name}_columns"
    with torch.device("meta"):
        added: dict[str, Operation] = {
            GATHER_HEADS: AllGather(tensor_parallel, num_inputs),
            columns_name: ColumnParallelLinear(num_inputs, num_outputs, tensor_parallel, product.bias is not None),
            GATHER_COLUMNS: AllGather(tensor_parallel, num_outputs),
        }
    before = projection.calls[:-1]  # what puts decode and prefill attention together, where there are both
    heads = projection.calls[-1].inputs[0]
    branch: list[Node] = []
    if before:
        branch.append(_node(heads, before, projection.inputs, heads, Resource.MEMORY))
    for name, source, output in (
        (GATHER_HEADS, heads, GATHER_HEADS),
        (columns_name, GATHER_HEADS, columns_name),
        (GATHER_COLUMNS, columns_name, node.outputs[0]),
    ):
        shapes = ", ".join(f"{key}{tuple(value.shape)}" for key, value in added[name].named_parameters())
        call = Call(name=name, inputs=(source,), signature=f"{type(added[name]).__name__}({shapes})")
        branch.append(_node(name, (call,), (source,), output, added[name].resource))
    nodes: list[Node] = []
    for other in traced.graph.nodes:
        nodes.append(replace(other, branch=REDUCE) if other in (projection, node) else other)
        if other is node:
            nodes += branch
    return replace(
        traced,
        graph=OperationGraph(tuple(nodes), traced.graph.output),
        operations={**traced.operations, **added},
    )


def _node(name: str, calls: tuple[Call, ...], inputs: tuple[str, ...], output: str, resource: Resource) -> Node:
    return Node(name=name, calls=calls, inputs=inputs, outputs=(output,), resource=resource, branch=GATHER)
