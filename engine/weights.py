"""Weights: checking that a checkpoint holds them, and loading one rank's share of them.

Each rank reads only its slices, straight from the mapped files into its parameters; what it holds in FP8 is quantised
slice by slice on the way, on its device. Checking reads headers alone and imports no torch, so that a wrong checkpoint
is refused before any rank starts.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint import FP8, Checkpoint
from engine.config import EngineConfig
from engine.errors import CheckpointError
from engine.kv_scales import kv_scale_faults
from engine.model_config import ModelConfig
from engine.weight_layout import ExpertNames, WeightSlice, own_expert_names, weight_layout
from engine.weight_scales import WeightScales

if TYPE_CHECKING:
    from torch import Tensor, nn

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

    Weights are cast to the parameters' dtype. Those stored in FP8 stay as they are in parameters of FP8, unless blocks
    of a row have scales of their own: these are quantised anew. `progress(bytes_done, bytes_total)` counts the stored
    bytes that this rank reads. Raises `CheckpointError`, before anything is read, as `check_checkpoint` does.
    """
    from safetensors import SafetensorError, safe_open

    checkpoint, names = _checked(config)
    parts = list(weight_layout(config.model, tensor_parallel.rank, tensor_parallel.size, names))
    parts.sort(key=lambda part: checkpoint.tensors[part.tensor].file)
    parameters = dict(model.named_parameters())
    total = sum(_stored_bytes(checkpoint, part) for part in parts)
    done = 0
    with ExitStack() as opened:

        @cache
        def opened_file(file: Path) -> Any:
            return opened.enter_context(safe_open(file, framework="pt"))

        for part in parts:
            try:
                weight = opened_file(checkpoint.tensors[part.tensor].file).get_slice(part.tensor)[part.source]
                scales = _scales(checkpoint, part, config.model, opened_file)
            except (SafetensorError, OSError) as error:
                file = checkpoint.tensors[part.tensor].file
                raise CheckpointError(f"{file} cannot be read: {error}.") from error
            _fill(parameters, part, weight, scales)
            done += _stored_bytes(checkpoint, part)
            if progress is not None:
                progress(done, total)


def _scales(
    checkpoint: Checkpoint, part: WeightSlice, config: ModelConfig, opened_file: Callable[[Path], Any]
) -> "Tensor | None":
    """What the stored values of the slice are multiplied with; None where they are what they say."""
    if checkpoint.tensors[part.tensor].dtype != FP8:
        return None
    scales = WeightScales.of(checkpoint, part.tensor, config.fp8)
    assert isinstance(scales, WeightScales), scales
    return scales.read(opened_file(checkpoint.tensors[scales.tensor].file), part.source)


def _fill(parameters: "dict[str, nn.Parameter]", part: WeightSlice, weight: "Tensor", scales: "Tensor | None") -> None:
    """Put one slice in its place; `scales` are as `WeightScales.read` has them."""
    import torch

    from engine.kernels.row_scales import quantise_into

    values = parameters[part.parameter].data[part.target]
    if values.dtype is not torch.float8_e4m3fn:
        values.copy_(weight if scales is None else weight.to(values.device).float() * scales.to(values.device))
        return
    row_scales = parameters[f"{part.parameter}_scale"].data[part.target[:-1]]
    if scales is None:
        quantise_into(values, row_scales, weight)
    elif scales.shape[1] == 1:
        values.copy_(weight)
        row_scales.copy_(scales[:, 0])
    else:
        quantise_into(values, row_scales, weight.to(values.device).float() * scales.to(values.device))


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
        elif stored.dtype == FP8 and isinstance(
            fault := WeightScales.of(checkpoint, part.tensor, config.model.fp8), str
        ):
            faults.append(fault)
    faults += kv_scale_faults(checkpoint, config.model)
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
