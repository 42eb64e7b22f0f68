"""`Values`: where the values between nodes lie, and the execution of a node's calls on them.

A value has a row for every token, in the order of the cut, at the place that a `BufferPlan` gives it in the arena; what
stays inside a node is an ordinary tensor.
"""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.operation import TokenKind
from engine.pipeline.flight import Flight
from engine.pipeline.graph import LAYER_INPUT, OperationGraph
from engine.pipeline.layer_program import BoundCall, BoundNode
from engine.pipeline.step_parts import StepParts
from engine.pipeline.stopwatch import Stopwatch
from engine.pipeline.tracer import STEP_INPUTS


class Values:
    """The values of one step. `places`: for every value its rows [T, ...], in copies that layers take in turn.

    `initial` [T, E] is what the first layer reads, wherever it lies; some of its tokens may be `arriving`.
    """

    def __init__(
        self,
        places: Mapping[str, Sequence[Tensor]],
        graph: OperationGraph,
        parts: StepParts,
        initial: Tensor,
        arriving: Flight | None = None,
    ) -> None:
        self._places = places
        self._output = graph.output
        self._parts = parts
        self._initial = initial
        self._arriving = arriving

    def of_layer(self, value: str, layer: int) -> Tensor:
        """The rows [T, ...] of a value of this layer; the input of a layer is the output of the one before."""
        if value == LAYER_INPUT:
            if layer == 0:
                return self._initial
            value, layer = self._output, layer - 1
        copies = self._places[value]
        return copies[layer % len(copies)]

    def arrive(self, start: int, stop: int, stopwatch: Stopwatch) -> None:
        """Wait for what of these tokens is still arriving; before they are read, by a collective too."""
        if self._arriving is not None and self._arriving.tokens[0] < stop and start < self._arriving.tokens[1]:
            self._arriving.land(stopwatch)
            self._arriving = None

    def run(self, bound: BoundNode, layer: int, start: int, stop: int, stopwatch: Stopwatch) -> None:
        """Compute a node for the tokens of a range, which may have none of the node's kind."""
        kind = bound.node.tokens
        rows = self._parts.rows(start, stop, kind)
        if rows[0][0] == rows[0][1]:
            return
        self.arrive(start, stop, stopwatch)
        local: dict[str, Tensor] = {}
        now = time.perf_counter()
        for call in bound.calls:
            if call.operation is not None and call.operation.is_join:
                local[call.name] = self.of_layer(call.inputs[0], layer)[start:stop]  # where all of them lie
                continue
            inputs = [
                self._parts.part(start, stop, kind)
                if value == STEP_INPUTS
                else local[value]
                if value in local
                else _read(self.of_layer(value, layer), rows)
                for value in call.inputs
            ]
            if call.is_local:
                local[call.name] = _compute(call, inputs)
            else:
                local[call.name] = _write(call, inputs, self.of_layer(call.name, layer), rows)
            now = stopwatch.spent(call.cost, now)

    def network_tensors(self, bound: BoundNode, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Output and input of a collective for a range."""
        (call,) = bound.calls
        source = self.of_layer(call.inputs[0], layer)[start:stop]
        return self.of_layer(call.name, layer)[start:stop], source


def _read(values: Tensor, rows: Sequence[tuple[int, int]]) -> Tensor:
    if len(rows) == 1:
        return values[rows[0][0] : rows[0][1]]
    return torch.cat([values[start:stop] for start, stop in rows])


def _compute(call: BoundCall, inputs: Sequence[object]) -> Tensor:
    if call.operation is None:
        first, second = inputs
        assert isinstance(first, Tensor) and isinstance(second, Tensor)
        return first + second
    result: Tensor = call.operation(*inputs)
    return result


def _write(call: BoundCall, inputs: Sequence[object], values: Tensor, rows: Sequence[tuple[int, int]]) -> Tensor:
    """Compute into the rows of a buffer; a range of several pieces is computed beside it and dealt out."""
    if len(rows) > 1:
        result = _compute(call, inputs)
        pieces = torch.split(result, [stop - start for start, stop in rows])
        for (start, stop), piece in zip(rows, pieces, strict=True):
            values[start:stop] = piece
        return result
    target = values[rows[0][0] : rows[0][1]]
    if call.operation is None:
        torch.add(*inputs, out=target)  # type: ignore[call-overload]
    else:
        call.operation.into(target, *inputs)
    return target


def probe(bound_nodes: Sequence[BoundNode], parts: StepParts, initial: Tensor) -> dict[str, Tensor]:
    """Run one layer plainly on the whole step and return its values between nodes, for their shapes and dtypes."""
    found: dict[str, Tensor] = {LAYER_INPUT: initial}
    num_tokens = len(initial)
    for bound in bound_nodes:
        kind = bound.node.tokens
        rows = parts.rows(0, num_tokens, kind)
        for call in bound.calls:
            inputs: list[object] = []
            for value in call.inputs:
                if value == STEP_INPUTS:
                    inputs.append(parts.part(0, num_tokens, kind))
                else:
                    is_outside = value not in {other.name for other in bound.calls} and kind is not TokenKind.ALL
                    inputs.append(_read(found[value], rows) if is_outside else found[value])
            found[call.name] = _compute(call, inputs)
    return found
