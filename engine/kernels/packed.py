"""Matrix products on a CPU with the weight in the layout that oneDNN computes with, laid out once and not
at every call.

Measured on one core of an AMD EPYC (Zen 5), 512 to 2,816 columns: 2.3 times as fast in float32 from 32 tokens on; in
bfloat16 2 to 2.7 times for one token, 1.2 for 32, 1.05 for 512. torch's own compiler packs the weights of frozen
models with the same two operators (`torch._inductor.mkldnn_lowerings`).
"""

import torch
from torch import Tensor
from torch import library as torch_operators

_DTYPES = (torch.float32, torch.bfloat16)
# The number of tokens that the layout is chosen for; it serves every other.
_TOKENS = 64


def can_pack(weight_OI: Tensor) -> bool:
    """Whether there is a layout for this weight here."""
    return (
        weight_OI.device.type == "cpu"
        and weight_OI.dtype in _DTYPES
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def pack(weight_OI: Tensor) -> Tensor:
    """The weight [O, I] in oneDNN's layout, of the same shape and dtype; readable by `linear` alone."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), _TOKENS)
    return packed


@torch_operators.custom_op("engine_kernels::packed_linear", mutates_args=())
def linear(input_TI: Tensor, packed_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """[T, I] -> [T, O], as `torch.nn.functional.linear` with the weight that was packed."""
    return product(input_TI, packed_OI, bias_O)


@linear.register_fake
def _(input_TI: Tensor, packed_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    return input_TI.new_empty(input_TI.shape[0], packed_OI.shape[0])


def product(input_TI: Tensor, packed_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """As `linear`, for callers that no compiler traces: without the microseconds that an operator of ours costs."""
    output_TO: Tensor = torch.ops.mkldnn._linear_pointwise.default(input_TI, packed_OI, bias_O, "none", [], "")
    return output_TO


def lower_for_inductor() -> None:
    """Let compiled code call oneDNN's product directly; torch's own lowering wants weights that are constants."""
    from torch._inductor.ir import TensorBox
    from torch._inductor.lowering import register_lowering
    from torch._inductor.mkldnn_ir import LinearUnary

    @register_lowering(torch.ops.engine_kernels.packed_linear.default, type_promotion_kind=None)
    def lower(input_TI: object, packed_OI: object, bias_O: object = None) -> object:
        output = LinearUnary.create(input_TI, packed_OI, bias_O, "none", [], "")  # type: ignore[no-untyped-call]
        return output if isinstance(output, TensorBox) else TensorBox.create(output)
