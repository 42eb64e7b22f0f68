"""The gate of a gated feed-forward (SwiGLU, arXiv 2002.05202)."""

from collections.abc import Callable

from torch import Tensor

from engine.batch_shape import BatchShape
from engine.kernels import fused
from engine.kernels.fp8_product import QuantisedRows
from engine.kernels.kernel import Argument, Kernel
from engine.operation import Operation, Resource, Work


class SiluAndMul(Operation):
    """silu(gate) * up, where the input holds the gate's columns and then those of up."""

    resource = Resource.MEMORY
    # The result in FP8, for a product that would quantise it, where a rank has a kernel that computes both.
    quantised: Callable[[Tensor], QuantisedRows] | None = None

    def __init__(self, width: int) -> None:
        """`width` is F, the columns of the result on this rank."""
        super().__init__()
        self.width = width

    def forward(self, gate_up_TF: Tensor) -> Tensor:
        """[T, 2 F] -> [T, F]."""
        if self.compiled is not None:
            return self.compiled(gate_up_TF)[0]
        return fused.silu_and_mul(gate_up_TF)

    def kernel(self, dtype: str, block_size: int) -> Kernel | None:
        """See `Operation`."""
        return Kernel.of("silu_and_mul", (Argument(dtype, ("T", 2 * self.width)),))

    def work(self, shape: BatchShape, element_bytes: int) -> Work:
        """Reads 2 F columns and writes F; exponential, addition, division and two products for each result."""
        num_elements = shape.num_tokens * self.width
        return Work(flops=5 * num_elements, sharded_bytes=3 * num_elements * element_bytes)
