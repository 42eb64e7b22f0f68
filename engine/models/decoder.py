"""`Decoder`: what every supported architecture shares, from token ids to hidden states and from those to logits.

An architecture is its decoder layer; the files beside this one hold one kind of layer each. Shapes: T tokens of the
step, K tokens whose logits are wanted, E hidden, V vocabulary.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from engine.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from engine.layers.norm import RMSNorm
from engine.model_config import ModelConfig
from engine.step_inputs import StepInputs
from engine.tensor_parallel import TensorParallel
from engine.units_at_hand import UnitsAtHand


class Decoder(nn.Module):
    """Embedding, decoder layers, final norm; the head is a separate call, for the few tokens that are sampled."""

    # Of the kernels that compute it, where some do that ask.
    units: UnitsAtHand | None = None

    def __init__(self, config: ModelConfig, tensor_parallel: TensorParallel, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tensor_parallel)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = VocabParallelHead(config.vocab_size, config.hidden_size, tensor_parallel)
        if config.tie_word_embeddings:
            self.lm_head.shard.weight = self.embed_tokens.shard.weight

    def forward(self, step: StepInputs) -> Tensor:
        """Hidden states [T, E] after the final norm; keys and values go to the step's cache."""
        hidden_TE = self.embed_tokens(step)
        for layer in self.layers:
            hidden_TE = layer(hidden_TE, step)
        normed_TE: Tensor = self.norm(hidden_TE)
        return normed_TE

    def logits(self, hidden_KE: Tensor) -> Tensor:
        """[K, E] -> float32 logits [K, V], the same on every rank."""
        logits_KV: Tensor = self.lm_head(hidden_KE)
        return logits_KV
