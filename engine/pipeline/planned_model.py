"""Planning needs the graph of a layer and not its weights: here one layer is built and traced without memory."""

import torch

from engine.layers.attention import PagedAttention, RotaryAndKVWrite
from engine.layers.rotary import RotaryTable
from engine.model_config import Architecture, ModelConfig
from engine.models import LAYERS, use_fp8
from engine.number_format import NumberFormat
from engine.pipeline.tracer import TracedLayer, trace_layer
from engine.tensor_parallel import TensorParallel


def trace_planned_layer(
    config: ModelConfig,
    num_devices: int = 1,
    layer: int = 0,
    number_format: NumberFormat = NumberFormat.BFLOAT16,
) -> TracedLayer:
    """Rank 0's share of a layer in a tensor-parallel group of `num_devices`, which need not exist.

    In FP8 its products are, and what is cached: `work` is then that of both, beside activations of another width.
    Everything is on the meta device, the table of rotations too. Raises `ConfigError` where the model cannot be shared
    by so many devices.
    """
    config.check_tensor_parallel(num_devices)
    tensor_parallel = TensorParallel(rank=0, size=num_devices)
    with torch.device("meta"):
        rotary = RotaryTable(config, torch.float32, torch.device("meta"))
        built = LAYERS[Architecture(config.architecture)](config, layer, tensor_parallel, rotary)
        if number_format is NumberFormat.FP8:
            use_fp8(built)
            for module in built.modules():
                if isinstance(module, PagedAttention | RotaryAndKVWrite):
                    module.cached_element_bytes = number_format.num_bytes
    return trace_layer(built, config.hidden_size)
