"""`ProductShare`: how much of a chain's time its matrix products take, measured once when the chain is made.

A compiled chain is one call, in which no clock can be read. Where a step's time went (`StepTimes`) is told by these
shares, which differ with the number of tokens.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.kernels.compiled import CompiledKernel
from engine.kernels.kernel import Argument
from engine.operation import Operation

_GROWTH_BITS = 3  # from one measured number of tokens to the next it is eight times as large
_NUM_SIZES = 4
_NUM_RUNS = 15
_NUM_BLOCKS = 512  # of one slot at least


@dataclass(frozen=True, slots=True)
class ProductShare:
    """Shares of the time, 0..1, of 1, 8, 64, 512 tokens."""

    shares: tuple[float, ...]

    def at(self, num_tokens: int) -> float:
        """That of the largest measured number which is not larger."""
        return self.shares[min(len(self.shares), 1 + (num_tokens.bit_length() - 1) // _GROWTH_BITS) - 1]

    @classmethod
    @torch.inference_mode()
    def measured(
        cls, compiled: CompiledKernel, products: Sequence[Operation], weights: tuple[Tensor, ...]
    ) -> "ProductShare":
        """Time the chain, and its products alone, the fastest of some runs each."""
        arguments = compiled.kernel.arguments[: len(compiled.kernel.arguments) - len(weights)]
        own = [kernel for product in products if (kernel := product.kernel(arguments[0].dtype, 1)) is not None]
        num_rows = min(len(weight) for weight in weights)  # of the table of angles, too, which positions look up
        shares: list[float] = []
        for num_tokens in (1 << _GROWTH_BITS * index for index in range(_NUM_SIZES)):
            inputs = [_example(argument, num_tokens, num_rows) for argument in arguments]
            values = [_example(kernel.arguments[0], num_tokens, num_rows) for kernel in own]
            chain_seconds = _fastest(partial(compiled.call, inputs, weights))
            seconds = sum(_fastest(partial(product, value)) for product, value in zip(products, values, strict=True))
            shares.append(min(1.0, seconds / chain_seconds))
        return cls(tuple(shares))


def _example(argument: Argument, num_tokens: int, num_rows: int) -> Tensor:
    """What the argument may be; a size with a name is that of tokens, or the cache's. Positions and slots differ, as
    far as there are rows.
    """
    shape = [num_tokens if size == "T" else _NUM_BLOCKS if isinstance(size, str) else size for size in argument.shape]
    if argument.dtype == "int64":
        return torch.arange(num_tokens) % num_rows
    return torch.zeros(shape, dtype=getattr(torch, argument.dtype))


def _fastest(run: Callable[[], object]) -> float:
    run()
    seconds: list[float] = []
    for _ in range(_NUM_RUNS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
