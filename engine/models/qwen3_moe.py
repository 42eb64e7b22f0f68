"""Qwen3-MoE (arXiv 2505.09388): some layers have a mixture of many small experts, some a dense feed-forward.

Shapes: T tokens, E hidden.
"""

from torch import Tensor, nn

from engine.layers.gated_mlp import GatedMLP
from engine.layers.mixture_of_experts import MixtureOfExperts
from engine.layers.norm import RMSNorm
from engine.layers.rotary import RotaryTable
from engine.layers.self_attention import SelfAttention
from engine.model_config import ModelConfig
from engine.step_inputs import StepInputs
from engine.tensor_parallel import TensorParallel


class Qwen3MoeLayer(nn.Module):
    """Attention with query/key norm, then experts or a dense feed-forward. Routing scores have the model's dtype."""

    def __init__(self, config: ModelConfig, layer: int, tensor_parallel: TensorParallel, rotary: RotaryTable) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = SelfAttention(config, layer, tensor_parallel, rotary)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = (
            MixtureOfExperts(config, tensor_parallel, round_scores=True)
            if config.is_sparse(layer)
            else GatedMLP(config, tensor_parallel)
        )

    def forward(self, hidden_TE: Tensor, step: StepInputs) -> Tensor:
        """[T, E] -> [T, E]."""
        hidden_TE = hidden_TE + self.attention(self.input_norm(hidden_TE), step)
        normed_TE = self.feed_forward_norm(hidden_TE)
        if isinstance(self.feed_forward, MixtureOfExperts):
            hidden_TE = hidden_TE + self.feed_forward(normed_TE, step)
        else:
            hidden_TE = hidden_TE + self.feed_forward(normed_TE)
        return hidden_TE
