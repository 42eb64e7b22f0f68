"""The dense decoder layer: Llama 2, 3 and 3.1+ (arXiv 2302.13971, 2407.21783), Mistral, Qwen2 and Qwen3.

These are one network. What sets them apart is in `ModelConfig` and read by `SelfAttention`: Llama's biases and
frequency bands, Mistral's window, Qwen2's query/key/value bias, Qwen3's query/key norm. Shapes: T tokens, E hidden.
"""

from torch import Tensor, nn

from engine.layers.gated_mlp import GatedMLP
from engine.layers.norm import RMSNorm
from engine.layers.rotary import RotaryTable
from engine.layers.self_attention import SelfAttention
from engine.model_config import ModelConfig
from engine.step_inputs import StepInputs
from engine.tensor_parallel import TensorParallel


class LlamaLayer(nn.Module):
    """Attention, then a gated feed-forward, each on normalised input and added to the residual."""

    def __init__(self, config: ModelConfig, layer: int, tensor_parallel: TensorParallel, rotary: RotaryTable) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = SelfAttention(config, layer, tensor_parallel, rotary)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = GatedMLP(config, tensor_parallel)

    def forward(self, hidden_TE: Tensor, step: StepInputs) -> Tensor:
        """[T, E] -> [T, E]."""
        hidden_TE = hidden_TE + self.attention(self.input_norm(hidden_TE), step)
        hidden_TE = hidden_TE + self.feed_forward(self.feed_forward_norm(hidden_TE))
        return hidden_TE
