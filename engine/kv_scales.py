"""`KVScales`: what keys and values of each layer are divided by to be stored in FP8, where a checkpoint says so.

Checkpoints that were calibrated hold two numbers a layer, under one of several names; compressed-tensors also says in
config.json that there are some (`kv_cache_scheme`, see `engine.fp8_checkpoint`). Without them the scale is 1. Checking
is done on headers alone; torch is needed only to read.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from engine.checkpoint import FP8, Checkpoint
from engine.config import EngineConfig
from engine.errors import CheckpointError
from engine.model_config import ModelConfig
from engine.number_format import NumberFormat

# Behind model.layers.N.self_attn: of llm-compressor and vLLM, of ModelOpt, and of AutoFP8, for keys and values at once.
_NAMES: Final = {
    "key": ("k_scale", "k_proj.k_scale", "kv_scale"),
    "value": ("v_scale", "v_proj.v_scale", "kv_scale"),
}
_ASYMMETRIC: Final = ("k_zero_point", "v_zero_point")


@dataclass(frozen=True, slots=True, kw_only=True)
class KVScales:
    """Of every layer, in order: a key stands for what is stored times its scale."""

    keys: tuple[float, ...]
    values: tuple[float, ...]

    @classmethod
    def none(cls, num_layers: int) -> "KVScales":
        """Keys and values are stored as they are."""
        return cls(keys=(1.0,) * num_layers, values=(1.0,) * num_layers)

    @classmethod
    def read(cls, config: EngineConfig) -> "KVScales":
        """Those of the configuration's checkpoint, 1 where it has none or the cache is not in FP8.

        Raises `CheckpointError` for a scale that is none.
        """
        if config.cache_format is not NumberFormat.FP8:
            return cls.none(config.model.num_layers)
        checkpoint = Checkpoint.open(config.checkpoint)
        keys, values = (
            tuple(_read(checkpoint, _name(checkpoint, layer, kind)) for layer in range(config.model.num_layers))
            for kind in _NAMES
        )
        return cls(keys=keys, values=values)


def kv_scale_faults(checkpoint: Checkpoint, model: ModelConfig) -> Iterator[str]:
    """What is wrong with the scales that a checkpoint has, or says that it has, in words."""
    is_declared = model.fp8 is not None and model.fp8.has_kv_scales
    for layer in range(model.num_layers):
        prefix = _prefix(layer)
        for name in _ASYMMETRIC:
            if prefix + name in checkpoint.tensors:
                yield f"{prefix}{name} makes scales of the KV cache asymmetric, which is not supported"
        for kind, names in _NAMES.items():
            found = _name(checkpoint, layer, kind)
            if found is None:
                if is_declared:
                    yield f"{prefix}{names[0]} is missing, which kv_cache_scheme in config.json promises"
                continue
            stored = checkpoint.tensors[found]
            if not stored.is_float or stored.dtype == FP8:
                yield f"{found} is stored as {stored.dtype}, which is not a supported floating-point dtype"
            elif math.prod(stored.shape) != 1:
                yield (
                    f"{found} has shape {list(stored.shape)}: only one scale for all heads of a layer is supported, "
                    "not one of each head"
                )


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}.self_attn."


def _name(checkpoint: Checkpoint, layer: int, kind: str) -> str | None:
    names = (_prefix(layer) + name for name in _NAMES[kind])
    return next((name for name in names if name in checkpoint.tensors), None)


def _read(checkpoint: Checkpoint, name: str | None) -> float:
    if name is None:
        return 1.0
    from safetensors import SafetensorError, safe_open

    file = checkpoint.tensors[name].file
    try:
        with safe_open(file, framework="pt") as tensors:
            scale = float(tensors.get_tensor(name).float())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    if not 0 < scale < math.inf:
        raise CheckpointError(f"{file}: {name} is {scale}, but a scale of a KV cache must be a number above zero.")
    return scale
