"""What a node is computed by: calls of operations, and `Chain`s of them that were compiled into one kernel.

`plan_chains` finds the longest runs of calls that have kernels (`Operation.kernel`) and describes each as one `Kernel`.
It compiles nothing and knows neither lanes nor tokens.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from engine.kernels.compiled import CompiledKernel
from engine.kernels.kernel import Argument, Kernel, KernelCall
from engine.operation import Operation
from engine.pipeline.product_share import ProductShare
from engine.pipeline.stopwatch import Cost, Stopwatch
from engine.pipeline.tracer import STEP_INPUTS
from engine.step_inputs import StepInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundCall:
    """One call: `operation` None is an addition."""

    name: str
    operation: Operation | None
    inputs: tuple[str, ...]
    cost: Cost

    @property
    def values(self) -> tuple[str, ...]:
        """Its inputs but for the step's."""
        return tuple(value for value in self.inputs if value != STEP_INPUTS)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Its own value."""
        return (self.name,)

    def compute(self, values: Sequence[Tensor], step: StepInputs) -> Sequence[Tensor]:
        """Its result."""
        if self.operation is None:
            return (values[0] + values[1],)
        result: Tensor = self.operation(*values, step) if STEP_INPUTS in self.inputs else self.operation(*values)
        return (result,)

    def book(self, started: float, num_tokens: int, stopwatch: Stopwatch) -> float:
        """Count the time since `started` as this call's; returns the time now."""
        return stopwatch.spent(self.cost, started)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Consecutive calls as one compiled kernel, with names for what it takes and gives."""

    values: tuple[str, ...]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]
    weights: tuple[Tensor, ...]
    compiled: CompiledKernel
    product_share: ProductShare | None

    def compute(self, values: Sequence[Tensor], step: StepInputs) -> Sequence[Tensor]:
        """Its results."""
        tensors = [*values]
        for operation in self.operations:
            tensors += operation.step_tensors(step)
        return self.compiled.call(tensors, self.weights)

    def book(self, started: float, num_tokens: int, stopwatch: Stopwatch) -> float:
        """Count the time since `started` as its product's and the others'; returns the time now."""
        if self.product_share is None:
            return stopwatch.spent(Cost.OTHER, started)
        return stopwatch.spent_with_product(self.product_share.at(num_tokens), started)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainPlan:
    """Calls that can become one kernel, or one that has none; `outputs` are those of their values that are wanted."""

    calls: tuple[BoundCall, ...]
    outputs: tuple[str, ...]
    kernel: Kernel | None

    def bound(self, compiled: CompiledKernel, known: dict[Kernel, ProductShare | None]) -> Chain:
        """The chain of more than one call, once its kernel is there. `known` holds what was measured of others."""
        operations = [call.operation for call in self.calls if call.operation is not None]
        weights = tuple(weight for each in operations for weight in each.weights())
        if compiled.kernel not in known:
            products = [call.operation for call in self.calls if call.cost is Cost.GEMM and call.operation is not None]
            known[compiled.kernel] = ProductShare.measured(compiled, products, weights) if products else None
        return Chain(
            values=_values(self.calls),
            outputs=self.outputs,
            operations=tuple(each for each in operations if type(each).step_tensors is not Operation.step_tensors),
            weights=weights,
            compiled=compiled,
            product_share=known[compiled.kernel],
        )


def plan_chains(
    calls: Sequence[BoundCall], outputs: Collection[str], *, dtype: str, block_size: int, hidden_size: int
) -> Iterator[ChainPlan]:
    """The calls of a node in order, as few as they can be joined into; `outputs` are the values used outside it.

    `dtype` names the number format of the activations, `block_size` is that of the KV cache in tokens.
    """
    hidden = Argument(dtype, ("T", hidden_size))
    found: list[tuple[list[BoundCall], list[Kernel | None]]] = []
    for call in calls:
        operation = call.operation
        own = Kernel.of("add", (hidden, hidden)) if operation is None else operation.kernel(dtype, block_size)
        if found and own is not None and found[-1][1][-1] is not None:
            found[-1][0].append(call)
            found[-1][1].append(own)
        else:
            found.append(([call], [own]))
    for index, (joined, kernels) in enumerate(found):
        later = {value for others, _ in found[index + 1 :] for call in others for value in call.values}
        wanted = tuple(call.name for call in joined if call.name in later.union(outputs))
        known = [kernel for kernel in kernels if kernel is not None]
        kernel = _joined(joined, known, wanted) if known else None
        yield ChainPlan(calls=tuple(joined), outputs=wanted, kernel=kernel)


def _values(calls: Sequence[BoundCall]) -> tuple[str, ...]:
    """What the calls take that none of them computes."""
    inside = {call.name for call in calls}
    return tuple(dict.fromkeys(value for call in calls for value in call.values if value not in inside))


def _joined(calls: Sequence[BoundCall], kernels: Sequence[Kernel], wanted: Collection[str]) -> Kernel:
    """One kernel of several with one call each: first the values, then what they take of the step, then weights."""
    values = _values(calls)
    of_values: dict[str, Argument] = {}
    of_steps: list[tuple[Argument, ...]] = []
    of_weights: list[tuple[Argument, ...]] = []
    for call, kernel in zip(calls, kernels, strict=True):
        num_values = len(call.values)
        first_weight = len(kernel.arguments) - (0 if call.operation is None else len(call.operation.weights()))
        of_values |= dict(zip(call.values, kernel.arguments[:num_values], strict=True))
        of_steps.append(kernel.arguments[num_values:first_weight])
        of_weights.append(kernel.arguments[first_weight:])
    arguments = (*(of_values[value] for value in values), *sum(of_steps, ()), *sum(of_weights, ()))
    places = {value: index for index, value in enumerate(values)}
    places |= {call.name: len(arguments) + index for index, call in enumerate(calls)}
    next_step, next_weight = len(values), len(values) + sum(map(len, of_steps))
    joined: list[KernelCall] = []
    for call, kernel, steps, weights in zip(calls, kernels, of_steps, of_weights, strict=True):
        inputs = (
            *(places[value] for value in call.values),
            *range(next_step, next_step + len(steps)),
            *range(next_weight, next_weight + len(weights)),
        )
        next_step, next_weight = next_step + len(steps), next_weight + len(weights)
        joined.append(KernelCall(kernel.calls[0].function, inputs, kernel.calls[0].constants))
    outputs = tuple(index for index, call in enumerate(calls) if call.name in wanted)
    return Kernel(arguments, tuple(joined), outputs)
