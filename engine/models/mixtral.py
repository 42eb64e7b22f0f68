"""Mixtral (arXiv 2401.04088): the feed-forward of every layer is a mixture of experts. Shapes: T tokens, E hidden."""

from torch import Tensor, nn

from engine.layers.mixture_of_experts import MixtureOfExperts
from engine.layers.norm import RMSNorm
from engine.layers.rotary import RotaryTable
from engine.layers.self_attention import SelfAttention
from engine.model_config import ModelConfig
from engine.step_inputs import StepInputs
from engine.tensor_parallel import TensorParallel


class MixtralLayer(nn.Module):
    """Attention, then experts. Routing scores stay in float32."""

    def __init__(self, config: ModelConfig, layer: int, tensor_parallel: TensorParallel, rotary: RotaryTable) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = SelfAttention(config, layer, tensor_parallel, rotary)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = MixtureOfExperts(config, tensor_parallel, round_scores=False)

    def forward(self, hidden_TE: Tensor, step: StepInputs) -> Tensor:
        """[T, E] -> [T, E]."""
        hidden_TE = hidden_TE + self.attention(self.input_norm(hidden_TE), step)
        hidden_TE = hidden_TE + self.feed_forward(self.feed_forward_norm(hidden_TE), step)
        return hidden_TE
