"""The sequential schedule: the whole batch through one operation after the other, as the plain model runs it.

Always a candidate, and the fallback for every batch that no plan was made for.
"""

from engine.operation import Resource, TokenKind
from engine.pipeline.graph import OperationGraph
from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.schedule import Lane, Schedule, Step


def sequential_schedule(graph: OperationGraph, num_decodes: int = 1, num_prefills: int = 1) -> Schedule:
    """One nano-batch in the order of the graph; with a token of each kind it scales to every batch.

    Of a collective that can be placed in several ways it takes the first.
    """
    num_tokens = num_decodes + num_prefills
    absent = {TokenKind.DECODE} if not num_decodes else {TokenKind.PREFILL} if not num_prefills else set()
    branches = set(graph.branches[1:])
    nodes = [node for node in graph.nodes if node.tokens not in absent and node.branch not in branches]
    lanes = {
        lane: tuple(
            Step(node.name, 0, num_tokens) for node in nodes if (node.resource is Resource.NETWORK) == is_network
        )
        for lane, is_network in ((Lane.COMPUTE, False), (Lane.NETWORK, True))
    }
    return Schedule(
        Cut((NanoBatch(num_decodes, num_prefills),)), {lane: steps for lane, steps in lanes.items() if steps}
    )
