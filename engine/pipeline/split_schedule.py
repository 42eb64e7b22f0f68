"""The schedule that splits a batch and overlaps nothing: what nano-batches cost before they gain anything.

The paper's ablation has it (NanoFlow, figure 9: 13.2 % slower than the whole batch).
"""

from engine.operation import Resource
from engine.pipeline.dependencies import has_tokens
from engine.pipeline.graph import OperationGraph
from engine.pipeline.nano_batch import Cut
from engine.pipeline.schedule import Lane, Schedule, Step


def split_schedule(graph: OperationGraph, cut: Cut) -> Schedule:
    """Every node on one nano-batch after the other, in the order of the graph; of several branches the first.

    Collectives have their lane, as everywhere; whoever runs it waits for each before the next step.
    """
    lanes: dict[Lane, list[Step]] = {Lane.COMPUTE: [], Lane.NETWORK: []}
    for node in graph.nodes:
        lane = Lane.NETWORK if node.resource is Resource.NETWORK else Lane.COMPUTE
        if node.branch in (None, *graph.branches[:1]):
            lanes[lane] += [
                Step(node.name, start, stop)
                for start, stop in zip(cut.borders, cut.borders[1:], strict=False)
                if has_tokens(cut, start, stop, node.tokens)
            ]
    return Schedule(cut, {lane: tuple(steps) for lane, steps in lanes.items() if steps})
