"""Weights: checking that a checkpoint holds them, and loading one rank's share of them.

Each rank reads only its slices, straight from the mapped files into its parameters. Checking reads headers alone and
imports no torch, so that a wrong checkpoint is refused before any rank starts.
"""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.errors import CheckpointError
from engine.model_config import ModelConfig
from engine.weight_layout import ExpertNames, WeightSlice, own_expert_names, weight_layout

if TYPE_CHECKING:
    from torch import nn

    from engine.tensor_parallel import TensorParallel

_MAX_FAULTS_SHOWN = 10


def checkpoint_bytes(path: Path) -> int:
    """Bytes of all weights in the checkpoint, as stored; raises `CheckpointError` when it cannot be read."""
    return sum(tensor.num_bytes for tensor in Checkpoint.open(path).tensors.values() if tensor.is_float)


def check_checkpoint(config: EngineConfig) -> None:
    """Raise `CheckpointError` naming every tensor that is missing, of an unexpected shape, or not of floats."""
    _checked(config)


def load_weights(
    model: "nn.Module",
    config: EngineConfig,
    tensor_parallel: "TensorParallel",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill the parameters of `model`, this rank's share as `engine.models.build_model` made it.

    Weights are cast to the parameters' dtype. `progress(bytes_done, bytes_total)` counts the stored bytes that this
    rank reads. Raises `CheckpointError`, before anything is read, as `check_checkpoint` does.
    """
    from safetensors import SafetensorError, safe_open

    checkpoint, names = _checked(config)
    parts = list(weight_layout(config.model, tensor_parallel.rank, tensor_parallel.size, names))
    parts.sort(key=lambda part: checkpoint.tensors[part.tensor].file)
    parameters = dict(model.named_parameters())
    total = sum(_stored_bytes(checkpoint, part) for part in parts)
    done = 0
    for file, group in groupby(parts, key=lambda part: checkpoint.tensors[part.tensor].file):
        try:
            with safe_open(file, framework="pt") as tensors:
                for part in group:
                    weight = tensors.get_slice(part.tensor)[part.source]
                    parameters[part.parameter].data[part.target].copy_(weight)
                    done += _stored_bytes(checkpoint, part)
                    if progress is not None:
                        progress(done, total)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}.") from error


def _stored_bytes(checkpoint: Checkpoint, part: WeightSlice) -> int:
    return checkpoint.tensors[part.tensor].element_bytes * part.num_elements


def _checked(config: EngineConfig) -> tuple[Checkpoint, ExpertNames]:
    """The checkpoint and how it names its experts, once every tensor of the model is known to be there and right."""
    checkpoint = Checkpoint.open(config.checkpoint)
    names = _expert_names(config.model, checkpoint)
    faults = []
    for part in {part.tensor: part for part in weight_layout(config.model, expert_names=names)}.values():
        stored = checkpoint.tensors.get(part.tensor)
        if stored is None:
            faults.append(f"{part.tensor} is missing")
        elif stored.shape != part.shape:
            faults.append(f"{part.tensor} has shape {list(stored.shape)} instead of {list(part.shape)}")
        elif not stored.is_float:
            faults.append(f"{part.tensor} is stored as {stored.dtype}, which is not a supported floating-point dtype")
    if faults:
        shown = "; ".join(faults[:_MAX_FAULTS_SHOWN])
        more = f"; and {len(faults) - _MAX_FAULTS_SHOWN} more" if len(faults) > _MAX_FAULTS_SHOWN else ""
        raise CheckpointError(f"{config.checkpoint} does not match its config.json: {shown}{more}.")
    return checkpoint, names


def _expert_names(config: ModelConfig, checkpoint: Checkpoint) -> ExpertNames:
    """Which of the known names the checkpoint uses; the architecture's own where it uses none of them."""
    for names in ExpertNames:
        wanted = next((part for part in weight_layout(config, expert_names=names) if "experts" in part.tensor), None)
        if wanted is not None and wanted.tensor in checkpoint.tensors:
            return names
    return own_expert_names(config)
