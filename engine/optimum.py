"""The most tokens per second that a device could compute if it did nothing but the model's matrix products.

Optimum = measured GEMM peak / (2 * active parameters): each token costs a multiplication and an addition per weight
that it meets (NanoFlow, section 3.2). Where the layers' products are in FP8 some are not, the output head's above all:
each kind then takes its time at its own peak. Torch-free.
"""

from dataclasses import dataclass

from engine.config import EngineConfig
from engine.executor import CacheCapacity
from engine.model_config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """What the matrix products of a whole group would allow, in tokens per second that meet every active parameter.

    `tokens_per_second` at the GEMM peak (the optimum), `dense_tokens_per_second` at the rate that the model's own
    products reach in a full dense batch. `head_share` of a token's time at the peak is the output head's: its share of
    the active parameters, and more where the other products are in FP8. `tail_share` is that of the products between
    the last attention and the head.
    """

    tokens_per_second: float
    dense_tokens_per_second: float
    head_share: float
    tail_share: float = 0.0

    @classmethod
    def of(cls, config: EngineConfig, capacity: CacheCapacity) -> "Optimum | None":
        """None where the executor measured no GEMM peak. The work of a token is divided among the group's devices."""
        peak = capacity.gemm_flops_per_second
        if peak is None:
            return None
        model, wide, size = config.model, capacity.wide_flops_per_second, config.tensor_parallel
        dense = capacity.dense_flops_per_second or peak
        token_seconds = 1 / optimal_tokens_per_second(peak, model, wide)
        return cls(
            tokens_per_second=size / token_seconds,
            dense_tokens_per_second=size * optimal_tokens_per_second(dense, model, wide),
            head_share=2 * model.hidden_size * model.vocab_size / (wide or peak) / token_seconds,
            tail_share=2 * _tail_parameters(model) / peak / token_seconds,
        )


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
    feed_forward = sum(_feed_forward_parameters(config, layer) for layer in range(config.num_layers))
    return config.num_layers * attention + feed_forward + config.hidden_size * config.vocab_size


def _feed_forward_parameters(config: ModelConfig, layer: int) -> int:
    """Those that one token is multiplied with."""
    if not config.is_sparse(layer):
        return 3 * config.hidden_size * config.intermediate_size
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    return config.num_experts_per_token * expert + config.hidden_size * config.num_experts


def _tail_parameters(config: ModelConfig) -> int:
    """The output projection and the feed-forward of the last layer."""
    projection = config.hidden_size * config.num_heads * config.head_dim
    return projection + _feed_forward_parameters(config, config.num_layers - 1)


def wide_parameters(config: ModelConfig) -> int:
    """Those of the active parameters whose products stay in the activations' format where the layers' are in FP8: of
    the routers and of the output head.
    """
    num_routers = sum(config.is_sparse(layer) for layer in range(config.num_layers))
    return config.hidden_size * (num_routers * config.num_experts + config.vocab_size)


def optimal_tokens_per_second(
    flops_per_second: float, config: ModelConfig, wide_flops_per_second: float | None = None
) -> float:
    """Tokens per second, prompt and generated together, of one device with the GEMM peak `flops_per_second`.

    Where that is the peak in FP8, the other one is of the products that are not in FP8.
    """
    num_wide = 0 if wide_flops_per_second is None else wide_parameters(config)
    seconds = 2 * (active_parameters(config) - num_wide) / flops_per_second
    if wide_flops_per_second is not None:
        seconds += 2 * num_wide / wide_flops_per_second
    return 1 / seconds
