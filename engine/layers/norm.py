"""Root-mean-square normalisation (arXiv 1910.07467)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine.batch_shape import BatchShape
from engine.kernels import fused
from engine.kernels.fp8_product import QuantisedRows
from engine.kernels.kernel import Argument, Kernel
from engine.operation import Operation, Resource, Work


class RMSNorm(Operation):
    """Divides the last dimension by its root mean square.

    As in transformers, the statistics of narrower activations are in float32 and the quotient is rounded before it
    meets the weight; float64 activations stay float64 throughout.
    """

    resource = Resource.MEMORY
    # The norm of the sum of two hidden states, and that sum, where a rank has a kernel that computes both.
    of_sum: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    # The same, and the norm itself, with the norm in FP8: for products that would quantise it.
    quantised: Callable[[Tensor], QuantisedRows] | None = None
    quantised_of_sum: Callable[[Tensor, Tensor], tuple[QuantisedRows, Tensor]] | None = None

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.epsilon = epsilon

    def forward(self, hidden_TE: Tensor) -> Tensor:
        """[..., E] -> [..., E]."""
        if self.compiled is not None:
            return self.compiled(hidden_TE, self.weight)[0]
        return fused.rms_norm(hidden_TE, self.weight, epsilon=self.epsilon)

    def kernel(self, dtype: str, block_size: int) -> Kernel | None:
        """See `Operation`."""
        size = self.weight.numel()
        arguments = (Argument(dtype, ("T", size)), Argument(dtype, (size,)))
        return Kernel.of("rms_norm", arguments, (("epsilon", self.epsilon),))

    def weights(self) -> tuple[Tensor, ...]:
        """See `Operation`."""
        return (self.weight,)

    def work(self, shape: BatchShape, element_bytes: int) -> Work:
        """One vector of E a token, read and written; a square, a sum and two products for each element."""
        num_elements = shape.num_tokens * self.weight.numel()
        return Work(
            flops=4 * num_elements,
            weight_bytes=self.weight.numel() * element_bytes,
            replicated_bytes=2 * num_elements * element_bytes,
        )
