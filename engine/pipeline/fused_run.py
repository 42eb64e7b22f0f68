"""`FusedRun`: the plain run of all layers, where additions are computed together with the norms of their sums.

The residual stream is then written and read once less in every half of a layer, the next layer's first norm included.
Which pairs there are is found out once, from the layers' graphs; whether a norm can be computed so, it says itself
(`RMSNorm.of_sum`). Everything else is computed by the operations, one after the other, on the current stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from engine.layers.norm import RMSNorm
from engine.pipeline.chain import BoundCall
from engine.pipeline.graph import LAYER_INPUT
from engine.pipeline.layer_program import LayerProgram
from engine.step_inputs import StepInputs


@dataclass(frozen=True, slots=True)
class _Instruction:
    """A call; an addition whose sum the norm `norm` (of the `in_next` layer, or of this one) is of has that, too."""

    call: BoundCall
    norm: BoundCall | None = None
    in_next: bool = False


class FusedRun:
    """For the layers of one rank's model in their order."""

    def __init__(self, programs: Sequence[LayerProgram]) -> None:
        self._outputs = [program.graph.output for program in programs]
        layers = [[call for bound in program.plain for call in bound.calls] for program in programs]
        self._layers: list[list[_Instruction]] = []
        done: set[str] = set()  # norms of this layer that are computed with an addition before them
        for index, calls in enumerate(layers):
            following = layers[index + 1] if index + 1 < len(layers) else []
            instructions: list[_Instruction] = []
            done_next: set[str] = set()
            for call in calls:
                norm, in_next = None, False
                if call.operation is None:
                    norm = _norm_of(call.name, calls)
                    if norm is not None:
                        done.add(norm.name)
                    elif call.name == self._outputs[index]:
                        norm, in_next = _norm_of(LAYER_INPUT, following), True
                        done_next |= set() if norm is None else {norm.name}
                if call.name not in done:
                    instructions.append(_Instruction(call, norm, in_next))
            self._layers.append(instructions)
            done = done_next

    @property
    def num_fused(self) -> int:
        """How many additions are computed together with a norm."""
        return sum(each.norm is not None for instructions in self._layers for each in instructions)

    def __call__(self, hidden_TE: Tensor, step: StepInputs) -> Tensor:
        """Hidden states before the first layer -> behind the last, [T, E]."""
        values = {LAYER_INPUT: hidden_TE}
        for instructions, output in zip(self._layers, self._outputs, strict=True):
            following: dict[str, Tensor] = {}
            for each in instructions:
                inputs = [values[value] for value in each.call.values]
                if each.norm is None:
                    values[each.call.name] = each.call.compute(inputs, step)[0]
                    continue
                norm = each.norm.operation
                assert isinstance(norm, RMSNorm) and norm.of_sum is not None
                normed_TE, values[each.call.name] = norm.of_sum(*inputs)
                (following if each.in_next else values)[each.norm.name] = normed_TE
            values = {LAYER_INPUT: values[output], **following}
        return values[LAYER_INPUT]


def _norm_of(value: str, calls: Sequence[BoundCall]) -> BoundCall | None:
    """The first norm of a value that can be computed with an addition."""
    for call in calls:
        if isinstance(call.operation, RMSNorm) and call.operation.of_sum is not None and call.values == (value,):
            return call
    return None
