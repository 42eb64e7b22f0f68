"""`LayerBench`: the nodes of a layer with values to compute on, so that each can be run again and again.

It runs them with the code and the buffers of a real step; only the tokens are made up. A collective gets buffers of
zeros, because a sum in place grows with every repetition.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from engine.batch_shape import BatchShape
from engine.config import EngineConfig
from engine.kv_cache import KVCache
from engine.layers.collective import CollectiveOperation
from engine.operation import Resource
from engine.pipeline.graph import LAYER_INPUT, OperationGraph
from engine.pipeline.layer_program import BoundNode, LayerProgram, shared_places
from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.plain_run import compute
from engine.pipeline.step_parts import StepParts
from engine.pipeline.stopwatch import Stopwatch
from engine.pipeline.synthetic_step import synthetic_step
from engine.pipeline.timer import Load
from engine.pipeline.values import Values
from engine.tensor_parallel import Collective


class LayerBench:
    """Nodes `names`, and what they need, on a batch of `shape` with random activations.

    Construction computes the nodes once, collectives included: all ranks must construct theirs together.
    """

    def __init__(
        self, program: LayerProgram, config: EngineConfig, cache: KVCache, shape: BatchShape, names: Collection[str]
    ) -> None:
        traced = program.traced
        device = cache.keys[0].device
        self._nodes = program.nodes
        self._stopwatch = Stopwatch()
        parts = StepParts(
            synthetic_step(shape, config.max_model_len, cache, device),
            Cut((NanoBatch(int(shape.num_decodes), int(shape.num_prefills)),)),
        )
        num_tokens = int(shape.num_tokens)
        initial = torch.randn(num_tokens, traced.hidden_size, dtype=getattr(torch, config.dtype.value), device=device)
        needed = [program.nodes[name] for name in _closure(traced.graph, names)]
        probed = {LAYER_INPUT: initial}
        for bound in needed:
            compute(bound, probed, parts.whole, self._stopwatch)
        in_place, joined = shared_places(traced)
        owners = {**joined, **in_place}
        places: dict[str, list[Tensor]] = {}
        for value, tensor in probed.items():
            if value in traced.graph.producers:
                owner = places.setdefault(owners.get(value, value), [tensor.new_empty(num_tokens, *tensor.shape[1:])])
                places[value] = owner
        self._values = Values(places, traced.graph, parts, initial)
        for bound in needed:
            self._run(bound, num_tokens)

    def load(self, name: str, num_tokens: int) -> Load:
        """The node on the first `num_tokens` tokens of the batch."""
        bound = self._nodes[name]
        if bound.node.resource is not Resource.NETWORK:
            return Load(lambda: self._run(bound, num_tokens))
        operation = bound.calls[0].operation
        assert isinstance(operation, CollectiveOperation)
        output, source = self._values.network_tensors(bound, 0, 0, num_tokens)
        is_shared = output.data_ptr() == source.data_ptr()
        zeros = torch.zeros_like(output)
        source_zeros = zeros if is_shared else torch.zeros_like(source)

        def start() -> Collective | None:
            return operation.start(zeros, source_zeros, is_beside=True)  # as plans run it

        def run() -> None:
            flight = start()
            if flight is not None:
                flight.wait()

        return Load(run, start)

    def _run(self, bound: BoundNode, num_tokens: int) -> None:
        self._values.run(bound, 0, 0, num_tokens, self._stopwatch)


def _closure(graph: OperationGraph, names: Collection[str]) -> list[str]:
    """These nodes and all that their inputs come from, in the order of the graph."""
    needed = set(names)
    for node in reversed(graph.nodes):
        if node.name in needed:
            needed.update(
                producer for value in node.inputs if value != LAYER_INPUT for producer in graph.producers[value]
            )
    return [node.name for node in graph.nodes if node.name in needed]
