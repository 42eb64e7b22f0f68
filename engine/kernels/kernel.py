"""`Kernel`: functions of `engine.kernels.fused` that are computed one after the other, as data to be compiled ahead.

A kernel with one call is that function; a chain of calls becomes one library, so that values between them need not
cross Python, nor the memory where loops can be joined. Nothing here knows how it is compiled, or what a layer is.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from engine.kernels import fused


@dataclass(frozen=True, slots=True)
class Argument:
    """A tensor; a size that has a name differs from call to call."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class KernelCall:
    """`function` of `fused`, with constants by their names. `inputs` count the kernel's arguments, then the results
    of its calls.
    """

    function: str
    inputs: tuple[int, ...]
    constants: tuple[tuple[str, float | None], ...] = ()

    def bound(self) -> Callable[..., Tensor]:
        """What it calls."""
        return functools.partial(getattr(fused, self.function), **dict(self.constants))


@dataclass(frozen=True, slots=True)
class Kernel:
    """Calls on `arguments`; `outputs` are the calls whose results are wanted."""

    arguments: tuple[Argument, ...]
    calls: tuple[KernelCall, ...]
    outputs: tuple[int, ...]

    @classmethod
    def of(
        cls, function: str, arguments: tuple[Argument, ...], constants: tuple[tuple[str, float | None], ...] = ()
    ) -> "Kernel":
        """One function of all the arguments."""
        return cls(arguments, (KernelCall(function, tuple(range(len(arguments))), constants),), (0,))

    @property
    def name(self) -> str:
        """Its functions."""
        return "+".join(call.function for call in self.calls)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Computed as the functions are written."""
        values = list(inputs)
        for call in self.calls:
            values.append(call.bound()(*(values[index] for index in call.inputs)))
        return tuple(values[len(inputs) + index] for index in self.outputs)
