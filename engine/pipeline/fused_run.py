"""`FusedRun`: the plain run of all layers, where additions are computed together with the norms of their sums.

The residual stream is then written and read once less in every half of a layer, the next layer's first norm included.
What only products in FP8 read, norms and gates make in FP8, rather than the product in a launch of its own. Which of
both there are is found out once, from the layers' graphs; whether a norm or a gate can be computed so, it says itself
(`RMSNorm.of_sum`, `quantised`). Everything else is computed by the operations, one after the other, on the current
stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.kernels.fp8_product import QuantisedRows
from engine.layers.activation import SiluAndMul
from engine.layers.collective import CollectiveOperation
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from engine.pipeline.chain import BoundCall
from engine.pipeline.graph import LAYER_INPUT
from engine.pipeline.layer_program import LayerProgram
from engine.pipeline.stopwatch import Cost
from engine.step_inputs import StepInputs

# By the signature of a layer's graph: its values by their names.
LayerSamples = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Instruction:
    """A call; an addition whose sum the norm `norm` (of the `in_next` layer, or of this one) is of has that, too.

    `quantises`: the norm, or what is called, makes its value in FP8.
    """

    call: BoundCall
    norm: BoundCall | None = None
    in_next: bool = False
    quantises: bool = False


class FusedRun:
    """For the layers of one rank's model in their order."""

    def __init__(self, programs: Sequence[LayerProgram]) -> None:
        self._outputs = [program.graph.output for program in programs]
        self._signatures = [program.graph.signature for program in programs]
        layers = [[call for bound in program.plain for call in bound.calls] for program in programs]
        in_fp8 = [_in_fp8(calls, output) for calls, output in zip(layers, self._outputs, strict=True)]
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
                    made, layer = (call, index) if norm is None else (norm, index + in_next)
                    instructions.append(_Instruction(call, norm, in_next, made.name in in_fp8[layer]))
            self._layers.append(instructions)
            done = done_next

    @property
    def num_fused(self) -> int:
        """How many additions are computed together with a norm."""
        return sum(each.norm is not None for instructions in self._layers for each in instructions)

    @property
    def num_quantised(self) -> int:
        """How many values are made in FP8."""
        return sum(each.quantises for instructions in self._layers for each in instructions)

    def __call__(self, hidden_TE: Tensor, step: StepInputs) -> Tensor:
        """Hidden states before the first layer -> behind the last, [T, E]."""
        values: dict[str, Any] = {LAYER_INPUT: hidden_TE}
        for instructions, output in zip(self._layers, self._outputs, strict=True):
            following: dict[str, Any] = {}
            for each in instructions:
                _compute(each, values, following, step)
            values = {LAYER_INPUT: values[output], **following}
        hidden_TE = values[LAYER_INPUT]
        return hidden_TE

    def samples(self, hidden_TE: Tensor, step: StepInputs) -> LayerSamples:
        """Compute one layer of every kind that there is, and whatever lies before, and keep all values of it.

        Nothing is exchanged with other ranks: a collective, which is a sum in place, gives zeros.
        """
        samples: LayerSamples = {}
        values: dict[str, Any] = {LAYER_INPUT: hidden_TE}
        for instructions, output, signature in zip(self._layers, self._outputs, self._signatures, strict=True):
            following: dict[str, Any] = {}
            for each in instructions:
                operation = each.call.operation
                if isinstance(operation, CollectiveOperation):
                    values[each.call.name] = torch.zeros_like(values[each.call.values[0]])
                else:
                    _compute(each, values, following, step)
            samples.setdefault(signature, {**values, **following})
            if samples.keys() == set(self._signatures):
                break
            values = {LAYER_INPUT: values[output], **following}
        return samples

    def run_only(self, cost: Cost, samples: LayerSamples, step: StepInputs) -> None:
        """Compute of all layers what counts as `cost`, each on the values that one of its kind had: to be timed.

        Collectives sum up zeros, which do not grow however often they are.
        """
        for instructions, signature in zip(self._layers, self._signatures, strict=True):
            values = samples[signature]
            for each in instructions:
                if each.call.cost is not cost:
                    continue
                if isinstance(each.call.operation, CollectiveOperation):
                    each.call.compute([values[each.call.name]], step)
                else:
                    _compute(each, dict(values), {}, step)


def _compute(each: _Instruction, values: dict[str, Any], following: dict[str, Any], step: StepInputs) -> None:
    """Add the results to the values of this layer, or of the following one."""
    inputs = [values[value] for value in each.call.values]
    if each.norm is None:
        values[each.call.name] = _computed(each, inputs, step)
        return
    norm = each.norm.operation
    assert isinstance(norm, RMSNorm)
    of_sum = norm.quantised_of_sum if each.quantises else norm.of_sum
    assert of_sum is not None
    normed_TE, values[each.call.name] = of_sum(*inputs)
    (following if each.in_next else values)[each.norm.name] = normed_TE


def _computed(each: _Instruction, inputs: Sequence[Any], step: StepInputs) -> Tensor | QuantisedRows:
    """The value of a call; of a tensor in FP8 where a product's input is made so."""
    operation = each.call.operation
    if each.quantises:
        assert isinstance(operation, RMSNorm | SiluAndMul) and operation.quantised is not None
        return operation.quantised(*inputs)
    if isinstance(operation, Linear) and isinstance(inputs[0], QuantisedRows):
        return operation.of_quantised(inputs[0])
    return each.call.compute(inputs, step)[0]


def _in_fp8(calls: Sequence[BoundCall], output: str) -> set[str]:
    """The values of norms and gates that products with weights in FP8 read, and nothing else does."""
    found = set()
    for call in calls:
        operation = call.operation
        if isinstance(operation, RMSNorm | SiluAndMul) and operation.quantised is not None and call.name != output:
            readers = [reader.operation for reader in calls if call.name in reader.values]
            if readers and all(isinstance(each, Linear) and each.weight_scale is not None for each in readers):
                found.add(call.name)
    return found


def _norm_of(value: str, calls: Sequence[BoundCall]) -> BoundCall | None:
    """The first norm of a value that can be computed with an addition."""
    for call in calls:
        if isinstance(call.operation, RMSNorm) and call.operation.of_sum is not None and call.values == (value,):
            return call
    return None
