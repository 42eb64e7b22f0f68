"""The most tokens per second that a device could compute if it did nothing but the model's matrix products.

Optimum = measured GEMM peak / (2 * active parameters): each token costs a multiplication and an addition per weight
that it meets (NanoFlow, section 3.2). Torch-free.
"""

from engine.model_config import ModelConfig


def active_parameters(config: ModelConfig) -> int:
    """Weights that one token is multiplied with: projections, feed-forward, router and output head.

    Of a mixture of experts only the `num_experts_per_token` that a token visits count. The embedding is looked up,
    not multiplied, and does not count; the output head does, though prompt tokens skip all but one of its products,
    so the optimum is slightly conservative for long prompts. Norms and biases (vectors) and the products of attention
    itself (they grow with the context, not with the model) are left out.
    """
    queries = config.num_heads * config.head_dim
    keys_and_values = 2 * config.num_kv_heads * config.head_dim
    attention = config.hidden_size * (2 * queries + keys_and_values)
    dense = 3 * config.hidden_size * config.intermediate_size
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    sparse = config.num_experts_per_token * expert + config.hidden_size * config.num_experts
    feed_forward = sum(sparse if config.is_sparse(layer) else dense for layer in range(config.num_layers))
    return config.num_layers * attention + feed_forward + config.hidden_size * config.vocab_size


def optimal_tokens_per_second(flops_per_second: float, config: ModelConfig) -> float:
    """Tokens per second, prompt and generated together, of one device with the GEMM peak `flops_per_second`."""
    return flops_per_second / (2 * active_parameters(config))
