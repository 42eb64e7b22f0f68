"""The gate of a gated feed-forward (SwiGLU, arXiv 2002.05202)."""

from torch import Tensor
from torch.nn import functional

from engine.operation import Operation, Resource


class SiluAndMul(Operation):
    """silu(gate) * up, where the input holds the gate's columns and then those of up."""

    resource = Resource.MEMORY

    def forward(self, gate_up_TF: Tensor) -> Tensor:
        """[T, 2 F] -> [T, F]."""
        gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
        return functional.silu(gate_TF) * up_TF
