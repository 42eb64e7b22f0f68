"""`SelfAttention`: the attention block of every supported architecture.

Llama, Mistral, Qwen and Mixtral differ here in biases, in query/key normalisation, in the window of a layer and in
the rotation's frequencies. All of that is in `ModelConfig`. Shapes: T tokens, E hidden.
"""

from torch import Tensor, nn

from engine.layers.attention import DecodeAttention, JoinTokens, PrefillAttention, RotaryAndKVWrite
from engine.layers.collective import AllReduce
from engine.layers.linear import QKVLinear, RowParallelLinear
from engine.layers.rotary import RotaryTable
from engine.model_config import ModelConfig
from engine.step_inputs import StepInputs
from engine.tensor_parallel import TensorParallel


class SelfAttention(nn.Module):
    """Causal grouped-query self-attention over the paged cache."""

    def __init__(self, config: ModelConfig, layer: int, tensor_parallel: TensorParallel, rotary: RotaryTable) -> None:
        super().__init__()
        self.qkv_proj = QKVLinear(config, tensor_parallel)
        self.rotary_and_kv_write = RotaryAndKVWrite(config, layer, tensor_parallel, rotary)
        self.decode_attention = DecodeAttention(config, layer, tensor_parallel)
        self.prefill_attention = PrefillAttention(config, layer, tensor_parallel)
        width = config.num_heads * config.head_dim
        self.join_tokens = JoinTokens(width // tensor_parallel.size)
        self.o_proj = RowParallelLinear(width, config.hidden_size, tensor_parallel, config.output_bias)
        self.all_reduce = AllReduce(tensor_parallel, config.hidden_size)

    def forward(self, hidden_TE: Tensor, step: StepInputs) -> Tensor:
        """[T, E] -> [T, E]."""
        query_THd = self.rotary_and_kv_write(self.qkv_proj(hidden_TE), step)
        decode_DA = self.decode_attention(query_THd, step)
        prefill_QA = self.prefill_attention(query_THd, step)
        attention_TE: Tensor = self.all_reduce(self.o_proj(self.join_tokens(decode_DA, prefill_QA)))
        return attention_TE
