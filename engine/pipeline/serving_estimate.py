"""`ServingEstimate`: what bounds a model on a group of devices, from a few of their figures: NanoFlow's equations 1-5.

The paper (arXiv 2408.12757, section 3) takes the largest batch: memory is full, so one step reads all of it. Its P is
every parameter a token meets, the embedding included; `engine.optimum` leaves out the embedding, which is looked up.
"""

from dataclasses import dataclass, replace

from engine.model_config import ModelConfig
from engine.optimum import active_parameters
from engine.pipeline.devices import DeviceSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingEstimate:
    """Seconds are those of one step of the whole model on `num_devices`; tokens are prompt and output together."""

    config: ModelConfig
    device: DeviceSpec
    num_devices: int = 1
    element_bytes: int = 2

    @property
    def active_parameters(self) -> int:
        """P: the parameters that a token meets; of a mixture of experts those of the few it is sent to."""
        return _with_embedding(self.config)

    @property
    def num_parameters(self) -> int:
        """All parameters, every expert's too: what the weights take in memory."""
        return _with_embedding(replace(self.config, num_experts_per_token=self.config.num_experts))

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers, on all devices together."""
        num_heads = self.config.kv_heads_per_rank(self.num_devices) * self.num_devices
        return 2 * self.config.num_layers * num_heads * self.config.head_dim * self.element_bytes

    def kv_capacity_tokens(self, weight_parameters: int | None = None) -> float:
        """Tokens whose keys and values fit beside the weights, with nothing set aside for anything else.

        `weight_parameters` are all parameters unless given: the paper's figure 3 comes out with the active ones, though
        a mixture of experts must hold the others too.
        """
        parameters = self.num_parameters if weight_parameters is None else weight_parameters
        free = self.num_devices * self.device.memory_bytes - parameters * self.element_bytes
        return max(0.0, free / self.kv_bytes_per_token)

    @property
    def memory_seconds(self) -> float:
        """Equation 1: every byte of memory is read once."""
        return self.device.memory_seconds(self.device.memory_bytes)

    def compute_seconds(self, num_tokens: float) -> float:
        """Equation 2: a multiplication and an addition for each token and parameter."""
        flops = 2 * num_tokens * self.active_parameters
        return self.device.compute_seconds(flops / self.num_devices, self.element_bytes)

    def network_seconds(self, num_tokens: float) -> float:
        """Equation 3: two all-reduces a layer, or two all-gathers and one all-reduce, which send as much."""
        elements = 4 * (self.num_devices - 1) * num_tokens * self.config.hidden_size * self.config.num_layers
        return self.device.network_seconds(elements * self.element_bytes / self.num_devices)

    def memory_to_compute(self, num_tokens: float) -> float:
        """Equation 4, T_R: below one, a step of so many tokens is bound by compute."""
        return self.memory_seconds / self.compute_seconds(num_tokens)

    @property
    def optimal_tokens_per_second(self) -> float:
        """Equation 5, per device: what compute allows when it never waits."""
        return 1 / (self.compute_seconds(1) * self.num_devices)


def dense_tokens(kv_capacity_tokens: float, num_prompt_tokens: float, num_output_tokens: float) -> float:
    """B_dense: tokens of a step when requests of p prompt and d output tokens fill the cache.

    A request holds p + d / 2 tokens on average, and its p + d tokens pass in d steps.
    """
    num_requests = kv_capacity_tokens / (num_prompt_tokens + num_output_tokens / 2)
    return num_requests * (num_prompt_tokens + num_output_tokens) / num_output_tokens


def _with_embedding(config: ModelConfig) -> int:
    """A tied embedding is the output head, which is counted already."""
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return active_parameters(config) + embedding
