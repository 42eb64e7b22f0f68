"""Models with products and cache in FP8, on a CPU and through the paged cache; and FP8 checkpoints to load."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import EngineConfig
from engine.kernels.row_scales import LARGEST_E4M3
from engine.kv_cache import KVCache
from engine.model_config import DType, ModelConfig
from engine.models import build_model
from engine.models.decoder import Decoder
from engine.number_format import NumberFormat
from engine.step_inputs import StepInputs
from engine.tensor_parallel import TensorParallel
from engine.weight_layout import weight_layout
from engine.weights import load_weights

CPU = torch.device("cpu")
# Turns a weight [O, I] into stored values, their scales, and what they stand for together.
Quantiser = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def load(
    path: Path,
    products: NumberFormat | None,
    cache: NumberFormat | None = None,
    *,
    dtype: DType | None = None,
    share: TensorParallel | None = None,
    max_model_len: int = 64,
) -> tuple[Decoder, EngineConfig]:
    """One rank's model with its weights; `dtype` is of the activations, the checkpoint's unless given."""
    share = share or TensorParallel()
    model_config = ModelConfig.from_checkpoint(path)
    config = EngineConfig(
        model=model_config,
        checkpoint=path,
        dtype=dtype or (products.dtype if products else model_config.dtype),
        tensor_parallel=share.size,
        block_size=4,
        max_model_len=max_model_len,
        product_format=products,
        kv_cache_format=cache,
    )
    model = build_model(model_config, share, getattr(torch, config.dtype.value), CPU, in_fp8=config.in_fp8)
    load_weights(model, config, share)
    return model, config


def prompt_logits(model: Decoder, config: EngineConfig, tokens: Tensor, chunk: int) -> Tensor:
    """Float32 logits [T, vocabulary] of a prompt whose chunks read what those before them have cached."""
    num_blocks = config.max_blocks_per_sequence
    cache = KVCache.allocate(config, num_blocks, CPU)
    tables = torch.arange(num_blocks)[None]
    logits = []
    with torch.inference_mode():
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            positions = torch.arange(start, start + len(part))
            step = StepInputs(
                tokens=part,
                positions=positions,
                slots=positions,
                decode_block_tables=tables[:0],
                decode_lengths=positions[:0],
                prefill_block_tables=tables,
                num_decodes=0,
                max_decode_length=0,
                prefill_chunk_sizes=(len(part),),
                prefill_context_lengths=(start + len(part),),
                kv_cache=cache,
            )
            logits.append(model.logits(model(step)))
    return torch.cat(logits)


def per_tensor(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One scale, without a shape."""
    scale = weight.float().abs().max() / LARGEST_E4M3
    values = (weight.float() / scale).to(torch.float8_e4m3fn)
    return values, scale, values.float() * scale


def per_channel(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales [O, 1]."""
    scales = weight.float().abs().amax(1, keepdim=True) / LARGEST_E4M3
    values = (weight.float() / scales).to(torch.float8_e4m3fn)
    return values, scales, values.float() * scales


def per_row(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales [O] in bfloat16."""
    values, scales, _ = per_channel(weight)
    scales = scales[:, 0].bfloat16()
    return values, scales, values.float() * scales.float()[:, None]


def per_block(rows: int, columns: int) -> Quantiser:
    """Scales [blocks of rows, blocks of columns]; the last of them may be smaller."""

    def quantise(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, num_columns = weight.shape
        scales = torch.empty(-(-num_rows // rows), -(-num_columns // columns))
        values, meant = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                block = (slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns))
                values[block], scales[row, column], meant[block] = per_tensor(weight[block])
        return values, scales, meant

    return quantise


def write_fp8(path: Path, quantise: Quantiser, quantization: dict[str, Any], suffix: str) -> dict[str, Tensor]:
    """Rewrite the weights of a checkpoint's products in FP8; what every tensor stands for from then on."""
    layout = {part.tensor: part for part in weight_layout(ModelConfig.from_checkpoint(path))}
    file = path / "model.safetensors"
    tensors, meant = load_file(file), {}
    for name, weight in list(tensors.items()):
        meant[name] = weight
        if layout[name].is_product:
            tensors[name], tensors[name + suffix], meant[name] = quantise(weight)
    save_file(tensors, file)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return meant
