"""The plain run of layers: one operation after the other on whole batches, each value an ordinary tensor.

It is how a CPU runs the sequential schedule: nothing is cut, so nothing needs a place that was planned. What a nano-
batched run computes, on buffers and ranges, is in `values`.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from engine.layers.collective import CollectiveOperation
from engine.operation import TokenKind
from engine.pipeline.flight import Flight
from engine.pipeline.graph import LAYER_INPUT
from engine.pipeline.layer_program import BoundNode, LayerProgram, is_join
from engine.pipeline.schedule import Lane
from engine.pipeline.stopwatch import Stopwatch
from engine.step_inputs import StepInputs


def run_layers(
    programs: Sequence[LayerProgram],
    hidden_TE: Tensor,
    step: StepInputs,
    stopwatch: Stopwatch,
    wanted_K: Tensor | None = None,
) -> Tensor:
    """Consecutive layers with one graph: [T, E] -> [T, E], in the order of the batch. May write over its input.

    With `wanted_K`, the rows that anybody will look at behind these layers, [K, E] of those: the others are computed as
    far as the cache needs them.
    """
    for layer, program in enumerate(programs):
        run = _LayerRun(program, layer, {LAYER_INPUT: hidden_TE}, step, stopwatch)
        if wanted_K is None or program is not programs[-1]:
            run.compute(program.plain)
            hidden_TE = run.values[program.graph.output]
            continue
        run.compute(program.plain[: program.tail.start])
        if len(wanted_K) == 0:
            return hidden_TE[:0]
        compute(program.tail.joins, run.values, step, stopwatch)
        rows = {name: value[wanted_K] for name, value in run.values.items() if name in program.tail.inputs}
        run = _LayerRun(program, layer, rows, _of_rows(step, wanted_K), stopwatch)
        run.compute(program.tail.nodes)
        hidden_TE = run.values[program.graph.output]
    return hidden_TE


def _of_rows(step: StepInputs, wanted_K: Tensor) -> StepInputs:
    """What a step says of its tokens, of these rows."""
    return replace(step, tokens=step.tokens[wanted_K], positions=step.positions[wanted_K], slots=step.slots[wanted_K])


class _LayerRun:
    """One layer on the way: its values so far, of as many rows as there are in each."""

    def __init__(
        self, program: LayerProgram, layer: int, values: dict[str, Tensor], step: StepInputs, stopwatch: Stopwatch
    ) -> None:
        self.values = values
        self._program = program
        self._layer = layer
        self._step = step
        self._stopwatch = stopwatch
        self._absent = set() if step.num_decodes else {TokenKind.DECODE}
        if step.num_decodes == len(step.tokens):
            self._absent.add(TokenKind.PREFILL)

    def compute(self, nodes: Sequence[BoundNode]) -> None:
        """Add the values of these nodes."""
        values, step, stopwatch = self.values, self._step, self._stopwatch
        for bound in nodes:
            node = bound.node
            if node.tokens in self._absent:
                continue
            operation = bound.calls[0].operation
            if isinstance(operation, CollectiveOperation):
                _exchange(bound, operation, node.name in self._program.in_place, self._layer, values, stopwatch)
                continue
            started = stopwatch.now()
            compute(bound, values, step, stopwatch)
            if stopwatch.events is not None:
                num_tokens = len(values[node.outputs[0]])
                stopwatch.record(node.name, Lane.COMPUTE, started, layer=self._layer, tokens=(0, num_tokens))


def compute(bound: BoundNode, values: dict[str, Tensor], step: StepInputs, stopwatch: Stopwatch) -> None:
    """Add the values of a node's pieces to `values`; those that only it uses, too."""
    now = stopwatch.now()
    for piece in bound.pieces:
        if is_join(piece):
            present = [values[value] for value in piece.values if value in values]
            values[piece.outputs[0]] = present[0] if len(present) == 1 else piece.compute(present, step)[0]
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
