"""`GatedMLP`: the dense feed-forward of every supported architecture. Shapes: T tokens, E hidden."""

from torch import Tensor, nn

from engine.layers.activation import SiluAndMul
from engine.layers.collective import AllReduce
from engine.layers.linear import ColumnParallelLinear, RowParallelLinear
from engine.model_config import ModelConfig
from engine.tensor_parallel import TensorParallel


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up as one GEMM."""

    def __init__(self, config: ModelConfig, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        hidden, intermediate, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = ColumnParallelLinear(hidden, 2 * intermediate, tensor_parallel, bias)
        self.silu_and_mul = SiluAndMul(intermediate // tensor_parallel.size)
        self.down_proj = RowParallelLinear(intermediate, hidden, tensor_parallel, bias)
        self.all_reduce = AllReduce(tensor_parallel, hidden)

    def forward(self, hidden_TE: Tensor) -> Tensor:
        """[T, E] -> [T, E]."""
        output_TE: Tensor = self.all_reduce(self.down_proj(self.silu_and_mul(self.gate_up_proj(hidden_TE))))
        return output_TE
