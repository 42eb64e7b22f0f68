"""`Values`: where the values between nodes lie, and the execution of a node's calls on them.

A value has a row for every token, in the order of the cut, at the place that a `BufferPlan` gives it in the arena; what
stays inside a node is an ordinary tensor.
"""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.pipeline.chain import BoundCall, Chain
from engine.pipeline.flight import Flight
from engine.pipeline.graph import LAYER_INPUT, OperationGraph
from engine.pipeline.layer_program import BoundNode
from engine.pipeline.step_parts import Parts, Rows
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
        parts: Parts,
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
        for piece in bound.pieces:
            if isinstance(piece, BoundCall):
                operation = piece.operation
                if operation is not None and operation.is_join:
                    local[piece.name] = self.of_layer(piece.inputs[0], layer)[start:stop]  # where all of them lie
                    continue
                if len(rows) == 1 and piece.name in bound.node.outputs:
                    local[piece.name] = target = self.of_layer(piece.name, layer)[slice(*rows[0])]
                    inputs: list[object] = [*self._inputs(piece, local, layer, rows)]
                    if STEP_INPUTS in piece.inputs:
                        inputs.append(self._parts.part(start, stop, kind))
                    if operation is None:
                        torch.add(*inputs, out=target)  # type: ignore[call-overload]
                    else:
                        operation.into(target, *inputs)
                    now = stopwatch.spent(piece.cost, now)
                    continue
            results = piece.compute(self._inputs(piece, local, layer, rows), self._parts.part(start, stop, kind))
            for name, result in zip(piece.outputs, results, strict=True):
                local[name] = result
                if name in bound.node.outputs:
                    _deal(result, self.of_layer(name, layer), rows)
            now = piece.book(now, len(results[0]), stopwatch)

    def _inputs(
        self, piece: BoundCall | Chain, local: Mapping[str, Tensor], layer: int, rows: Sequence[Rows]
    ) -> list[Tensor]:
        return [local[value] if value in local else _read(self.of_layer(value, layer), rows) for value in piece.values]

    def network_tensors(self, bound: BoundNode, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Output and input of a collective for a range."""
        (call,) = bound.calls
        source = self.of_layer(call.inputs[0], layer)[start:stop]
        return self.of_layer(call.name, layer)[start:stop], source


def _read(values: Tensor, rows: Sequence[Rows]) -> Tensor:
    if len(rows) == 1:
        return values[rows[0][0] : rows[0][1]]
    return torch.cat([values[start:stop] for start, stop in rows])


def _deal(result: Tensor, values: Tensor, rows: Sequence[Rows]) -> None:
    """Put the rows of a result where they belong."""
    for (start, stop), piece in zip(rows, torch.split(result, [stop - start for start, stop in rows]), strict=True):
        values[start:stop] = piece
