"""Linear operations whose weight is cut over the ranks of a tensor-parallel group.

A column-parallel weight is cut along its outputs, a row-parallel one along its inputs, so that a pair of them needs
one all-reduce (Megatron-LM, arXiv 1909.08053). Shapes: T tokens, I inputs and O outputs of this rank.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.batch_shape import BatchShape
from engine.kernels import packed
from engine.kernels.fp8_product import QuantisedRows, fp8_product, product_of_quantised
from engine.kernels.kernel import Argument, Kernel
from engine.model_config import ModelConfig
from engine.operation import Operation, Resource, Work
from engine.tensor_parallel import TensorParallel
from engine.weight_layout import SCALE_BYTES


class Linear(Operation):
    """Every rank holds and computes the whole of it.

    Subclasses say whether their input and their output (or the partial sums of one) are the same tokens and columns on
    every rank, and whether their product can be in FP8.
    """

    resource = Resource.COMPUTE
    has_replicated_input: ClassVar[bool] = True
    has_replicated_output: ClassVar[bool] = True
    can_be_fp8: ClassVar[bool] = False

    def __init__(self, num_inputs: int, num_outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(num_outputs), requires_grad=False) if bias else None
        # Of each output channel, where the weight is in FP8: see `engine.kernels.row_scales`.
        self.weight_scale: nn.Parameter | None = None

    def use_fp8(self) -> None:
        """Have a weight in FP8, where the operation can; to be called before it has memory."""
        if self.can_be_fp8:
            weight_OI = torch.empty_like(self.weight, dtype=torch.float8_e4m3fn)
            self.weight = nn.Parameter(weight_OI, requires_grad=False)
            scales_O = weight_OI.new_empty(weight_OI.shape[0], dtype=torch.float32)
            self.weight_scale = nn.Parameter(scales_O, requires_grad=False)

    def pack(self) -> None:
        """Lay the weight out for this CPU's matrix products, where there is such a layout; only `forward` and `into`
        can read it then.
        """
        if packed.can_pack(self.weight):
            self.weight = nn.Parameter(packed.pack(self.weight), requires_grad=False)

    def forward(self, input_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        if self.weight_scale is not None:
            return fp8_product(input_TI, self.weight, self.weight_scale, self.bias)
        if self.weight.is_mkldnn:
            return packed.product(input_TI, self.weight, self.bias)
        return functional.linear(input_TI, self.weight, self.bias)

    def of_quantised(self, input_TI: QuantisedRows) -> Tensor:
        """As `forward`, bit for bit, of an input in FP8; for a weight in FP8."""
        assert self.weight_scale is not None
        return product_of_quantised(input_TI, self.weight, self.weight_scale, self.bias)

    def into(self, output_TO: Tensor, input_TI: Tensor) -> None:  # type: ignore[override]
        """As `forward`, bit for bit; without a copy, but for packed weights, whose product has no such form."""
        if self.weight_scale is not None:
            fp8_product(input_TI, self.weight, self.weight_scale, self.bias, output_TO)
        elif self.weight.is_mkldnn:
            output_TO.copy_(self(input_TI))
        elif self.bias is None:
            torch.mm(input_TI, self.weight.t(), out=output_TO)
        else:
            torch.addmm(self.bias, input_TI, self.weight.t(), out=output_TO)

    def kernel(self, dtype: str, block_size: int) -> Kernel | None:
        """See `Operation`; a weight that was not packed has none."""
        if not self.weight.is_mkldnn:
            return None
        weights = (Argument(dtype, tuple(weight.shape)) for weight in self.weights())
        return Kernel.of("linear", (Argument(dtype, ("T", self.weight.shape[1])), *weights))

    def weights(self) -> tuple[Tensor, ...]:
        """See `Operation`."""
        return tuple(weight for weight in (self.weight, self.weight_scale, self.bias) if weight is not None)

    def work(self, shape: BatchShape, element_bytes: int) -> Work:
        """2 I O operations a token; weight, input and output each cross the memory once.

        In FP8 the quantised input does, too, twice.
        """
        num_outputs, num_inputs = self.weight.shape
        num_bias = 0 if self.bias is None else num_outputs
        replicated = self.has_replicated_input * num_inputs + self.has_replicated_output * num_outputs
        sharded = num_inputs + num_outputs - replicated
        weight_bytes = (num_inputs * num_outputs + num_bias) * element_bytes
        quantised_bytes = fp8_flops = 0.0
        if self.weight_scale is not None:
            weight_bytes = num_inputs * num_outputs + SCALE_BYTES * num_outputs + num_bias * element_bytes
            quantised_bytes = 2 * num_inputs
            fp8_flops = shape.num_tokens * 2 * num_inputs * num_outputs
        return Work(
            flops=shape.num_tokens * (2 * num_inputs * num_outputs + num_bias),
            fp8_flops=fp8_flops,
            weight_bytes=weight_bytes,
            sharded_bytes=shape.num_tokens
            * (sharded * element_bytes + quantised_bytes * (not self.has_replicated_input)),
            replicated_bytes=shape.num_tokens
            * (replicated * element_bytes + quantised_bytes * self.has_replicated_input),
        )


class ColumnParallelLinear(Linear):
    """Each rank computes its share of the outputs; projections of the same input are fused along them."""

    has_replicated_output = False
    can_be_fp8 = True

    def __init__(self, num_inputs: int, num_outputs: int, tensor_parallel: TensorParallel, bias: bool = False) -> None:
        super().__init__(num_inputs, num_outputs // tensor_parallel.size, bias)


class QKVLinear(Linear):
    """Queries, keys and values of this rank's heads; a key/value head that several ranks need is computed by each."""

    has_replicated_output = False
    can_be_fp8 = True

    def __init__(self, config: ModelConfig, tensor_parallel: TensorParallel) -> None:
        size = tensor_parallel.size
        num_heads = config.num_heads // size + 2 * config.kv_heads_per_rank(size)
        super().__init__(config.hidden_size, num_heads * config.head_dim, config.qkv_bias)


class RowParallelLinear(Linear):
    """Each rank computes a part of the sum over the inputs; rank 0 alone adds the bias."""

    has_replicated_input = False
    can_be_fp8 = True

    def __init__(self, num_inputs: int, num_outputs: int, tensor_parallel: TensorParallel, bias: bool = False) -> None:
        super().__init__(num_inputs // tensor_parallel.size, num_outputs, bias and tensor_parallel.rank == 0)
