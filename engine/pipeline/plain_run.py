"""The plain run of layers: one operation after the other on whole batches, each value an ordinary tensor.

It is how a CPU runs the sequential schedule: nothing is cut, so nothing needs a place that was planned. What a nano-
batched run computes, on buffers and ranges, is in `values`.
"""

from collections.abc import Sequence

from torch import Tensor

from engine.layers.collective import CollectiveOperation
from engine.operation import TokenKind
from engine.pipeline.chain import BoundCall
from engine.pipeline.flight import Flight
from engine.pipeline.graph import LAYER_INPUT
from engine.pipeline.layer_program import BoundNode, LayerProgram
from engine.pipeline.schedule import Lane
from engine.pipeline.stopwatch import Stopwatch
from engine.step_inputs import StepInputs


def run_layers(programs: Sequence[LayerProgram], hidden_TE: Tensor, step: StepInputs, stopwatch: Stopwatch) -> Tensor:
    """Consecutive layers with one graph: [T, E] -> [T, E], in the order of the batch. May write over its input."""
    graph = programs[0].graph
    num_tokens = len(hidden_TE)
    absent = {TokenKind.DECODE} if step.num_decodes == 0 else set()
    if step.num_decodes == num_tokens:
        absent.add(TokenKind.PREFILL)
    for layer, program in enumerate(programs):
        values = {LAYER_INPUT: hidden_TE}
        for bound in program.plain:
            node = bound.node
            if node.tokens in absent:
                continue
            operation = bound.calls[0].operation
            if isinstance(operation, CollectiveOperation):
                _exchange(bound, operation, node.name in program.in_place, layer, values, stopwatch)
                continue
            started = stopwatch.now()
            compute(bound, values, step, stopwatch)
            if stopwatch.events is not None:
                stopwatch.record(node.name, Lane.COMPUTE, started, layer=layer, tokens=(0, num_tokens))
        hidden_TE = values[graph.output]
    return hidden_TE


def compute(bound: BoundNode, values: dict[str, Tensor], step: StepInputs, stopwatch: Stopwatch) -> None:
    """Add the values of a node's pieces to `values`; those that only it uses, too."""
    now = stopwatch.now()
    for piece in bound.pieces:
        if isinstance(piece, BoundCall) and piece.operation is not None and piece.operation.is_join:
            present = [values[value] for value in piece.inputs if value in values]
            values[piece.name] = present[0] if len(present) == 1 else piece.compute(present, step)[0]
            continue
        results = piece.compute([values[value] for value in piece.values], step)
        for name, result in zip(piece.outputs, results, strict=True):
            values[name] = result
        now = piece.book(now, len(results[0]), stopwatch)


def _exchange(
    bound: BoundNode,
    operation: CollectiveOperation,
    is_in_place: bool,
    layer: int,
    values: dict[str, Tensor],
    stopwatch: Stopwatch,
) -> None:
    """Run a collective and wait for it."""
    (call,) = bound.calls
    source = values[call.inputs[0]]
    output = source if is_in_place else source.new_empty(*source.shape[:-1], operation.width)
    flight = Flight(operation, output, source, name=call.name, layer=layer, tokens=(0, len(source)))
    flight.land(stopwatch)
    values[call.name] = output
