"""The registry of architectures, and how a model of one is built: on its device, with its weights still undefined."""

from collections.abc import Callable

import torch
from torch import nn

from engine.layers.linear import Linear
from engine.layers.mixture_of_experts import GroupedExperts
from engine.layers.rotary import RotaryTable
from engine.model_config import Architecture, ModelConfig
from engine.models.decoder import Decoder
from engine.models.llama import LlamaLayer
from engine.models.mixtral import MixtralLayer
from engine.models.qwen3_moe import Qwen3MoeLayer
from engine.tensor_parallel import TensorParallel

LayerFactory = Callable[[ModelConfig, int, TensorParallel, RotaryTable], nn.Module]

LAYERS: dict[Architecture, LayerFactory] = {
    Architecture.LLAMA: LlamaLayer,
    Architecture.MISTRAL: LlamaLayer,
    Architecture.MIXTRAL: MixtralLayer,
    Architecture.QWEN2: LlamaLayer,
    Architecture.QWEN3: LlamaLayer,
    Architecture.QWEN3_MOE: Qwen3MoeLayer,
}


def build_model(
    config: ModelConfig,
    tensor_parallel: TensorParallel,
    dtype: torch.dtype,
    device: torch.device,
    *,
    in_fp8: bool = False,
) -> Decoder:
    """One rank's share of the model, for `engine.weights.load_weights` to fill; with its layers' products in FP8."""
    factory = LAYERS[Architecture(config.architecture)]
    rotary = RotaryTable(config, dtype, device)
    # On the meta device layers need not know the dtype, and nothing is allocated in the wrong one first.
    with torch.device("meta"):
        layers = [factory(config, layer, tensor_parallel, rotary) for layer in range(config.num_layers)]
        model = Decoder(config, tensor_parallel, layers)
        model.to(dtype)
        if in_fp8:
            use_fp8(model.layers)
    _allocate(model, device)
    return model.eval()


def use_fp8(layers: nn.Module) -> None:
    """Have the products of these layers in FP8, before their weights have memory."""
    for module in layers.modules():
        if isinstance(module, Linear | GroupedExperts):
            module.use_fp8()


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Give every parameter memory; unlike `Module.to_empty`, one that several modules share stays shared."""
    allocated: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in allocated:
                memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                allocated[parameter] = nn.Parameter(memory, requires_grad=False)
            setattr(module, name, allocated[parameter])
