"""The part `profile`: what the operations of a layer of Llama-3-8B cost on this device, alone and beside each other, as
the files that `plan --profile` reads on a machine with the solver. See docs/GPU.md for the way there and back.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from gpu_parts.budget import NO_TIME, Budget
from gpu_parts.ledger import Ledger, Row
from gpu_parts.throughput import WORKLOADS, LoadSizes, llama_8b_shape

from engine.config import DeviceKind, EngineConfig
from engine.gpu_model import use_gpu_kernels
from engine.model_config import ModelConfig
from engine.models import build_model
from engine.models.decoder import Decoder
from engine.number_format import NumberFormat
from engine.pipeline.fingerprint import fingerprint_of
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.profile_grid import QUICK, THOROUGH
from engine.pipeline.profiler import Profiler
from engine.tensor_parallel import TensorParallel

_SIZES = LoadSizes()  # what is profiled is what the part `throughput` runs
_THOROUGH_SECONDS = 60.0
_SETUP_SECONDS = 4.0  # a model, its kernels, and the least repetitions


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSizes:
    """What is profiled. `name` is what `plan --model-config` calls the model."""

    name: str = "llama-3-8b"
    model: ModelConfig | None = None
    formats: Sequence[NumberFormat] = (NumberFormat.BFLOAT16, NumberFormat.FP8)
    max_batch_tokens: int = _SIZES.max_batch_tokens
    max_sequences: int = _SIZES.max_sequences
    max_model_len: int = max(map(sum, WORKLOADS))


def measure_profiles(
    ledger: Ledger, budget: Budget, folder: Path, device: torch.device, sizes: ProfileSizes | None = None
) -> None:
    """One file and one row per number format; the first takes as much time as all others together."""
    sizes = sizes or ProfileSizes()
    for number, number_format in enumerate(sizes.formats):
        name = f"{sizes.name} {number_format.value}"
        seconds = budget.left / min(2, len(sizes.formats) - number) - _SETUP_SECONDS
        if seconds <= 0:
            ledger.skip("profile", name, NO_TIME)
            continue
        try:
            ledger.add(_measured(name, folder, device, sizes, number_format, seconds))
        except Exception as error:  # the other format may still be measured
            ledger.add(Row(group="profile", name=name, is_right=False, note=f"{type(error).__name__}: {error}"[:300]))


def profile_file(name: str, number_format: NumberFormat) -> str:
    """As `gpu_parts.results` looks for it."""
    return f"profile-{name}-{number_format.value}.json"


def _measured(
    name: str, folder: Path, device: torch.device, sizes: ProfileSizes, number_format: NumberFormat, seconds: float
) -> Row:
    config = EngineConfig(
        model=sizes.model or llama_8b_shape(),
        checkpoint=Path("unused"),
        dtype=number_format.dtype,
        product_format=number_format,
        device=DeviceKind(device.type),
        max_model_len=sizes.max_model_len,
        max_batch_tokens=sizes.max_batch_tokens,
        max_sequences=sizes.max_sequences,
    )
    layer = replace(config, model=replace(config.model, num_layers=1, sliding_windows=config.model.sliding_windows[:1]))
    told: list[str] = []
    pipeline = Pipeline(_random_model(layer, device, told), layer.model.hidden_size)
    alone = TensorParallel()
    fingerprint = fingerprint_of(config, pipeline.graph.signature, alone)
    grid = replace(THOROUGH if seconds >= _THOROUGH_SECONDS else QUICK, seconds=seconds)
    started = time.monotonic()
    path = folder / profile_file(sizes.name, number_format)
    profile = Profiler(pipeline.program, layer, alone, device, fingerprint, grid, pipeline.units).profile(path)
    note = f"{len(profile.nodes)} operations, {len(profile.interference)} pairs, {grid.name}; {path.name}"
    return Row(
        group="profile", name=name, value=time.monotonic() - started, unit="s", is_right=not told,
        note="; ".join([note, *told]),
    )  # fmt: skip


def _random_model(config: EngineConfig, device: torch.device, told: list[str]) -> Decoder:
    """Weights that keep the size of activations; `told` why kernels cannot compute it."""
    dtype = getattr(torch, config.dtype.value)
    model = build_model(config.model, TensorParallel(), dtype, device, in_fp8=config.in_fp8)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0 if parameter.dtype is dtype else 1e-2)
        elif parameter.element_size() == 1:  # with scales of a hundredth
            parameter.copy_(torch.randn(parameter.shape, dtype=dtype, device=device))
        else:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    if device.type == "cuda":
        use_gpu_kernels(model, config, device, told.append)
    return model
