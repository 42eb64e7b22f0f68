"""Profiles a tiny model, in this process or as one rank of a group; imported by the spawned ranks of a test."""

from pathlib import Path

import torch
import torch.distributed as dist

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.model_config import ModelConfig
from engine.models import build_model
from engine.pipeline.fingerprint import fingerprint_of
from engine.pipeline.layer_program import LayerProgram
from engine.pipeline.profile import Profile
from engine.pipeline.profile_grid import ProfileGrid
from engine.pipeline.profiler import Profiler
from engine.pipeline.tracer import TracedLayer, trace_layer
from engine.tensor_parallel import TensorParallel
from engine.weights import load_weights

GRID = ProfileGrid(name="tiny", seconds=0.3, sizes=(1 / 4, 1.0), contexts=(1 / 8, 1 / 2))


def config_of(checkpoint: Path, size: int) -> EngineConfig:
    """Small limits."""
    model = ModelConfig.from_checkpoint(checkpoint)
    return EngineConfig(
        model=model,
        checkpoint=checkpoint,
        dtype=model.dtype,
        tensor_parallel=size,
        max_model_len=64,
        max_batch_tokens=64,
        max_sequences=16,
        block_size=4,
        num_threads=1,
    )


def traced_layer(config: EngineConfig, tensor_parallel: TensorParallel) -> TracedLayer:
    """The first layer of the model with its weights."""
    dtype = getattr(torch, config.dtype.value)
    model = build_model(config.model, tensor_parallel, dtype, torch.device("cpu"))
    load_weights(model, config, tensor_parallel)
    return trace_layer(model.layers[0], config.model.hidden_size)


def profiler_of(traced: TracedLayer, config: EngineConfig, tensor_parallel: TensorParallel) -> Profiler:
    """A profiler with the tiny grid."""
    fingerprint = fingerprint_of(config, traced.graph.signature, tensor_parallel)
    return Profiler(LayerProgram.of(traced), config, tensor_parallel, torch.device("cpu"), fingerprint, GRID)


def profile_rank(rank: int, size: int, checkpoint: Path, output: Path) -> None:
    """One rank: profiles into one file, then once more from that file without its last half; keeps what it got.

    At last into a file that rank 0 cannot write.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{output / 'rendezvous'}", rank=rank, world_size=size)
    tensor_parallel = TensorParallel(rank, size, dist.group.WORLD)
    config = config_of(checkpoint, size)
    traced = traced_layer(config, tensor_parallel)
    file = output / "profile.json"
    full = profiler_of(traced, config, tensor_parallel).profile(file)
    (output / f"full-{rank}.json").write_text(str(full))
    if rank == 0:
        nodes = dict(list(full.nodes.items())[:3])
        Profile(
            fingerprint=full.fingerprint,
            source=full.source,
            number_format=full.number_format,
            layer=full.layer,
            nodes=nodes,
            interference=full.interference[:6],
        ).write(file)
    again = profiler_of(traced, config, tensor_parallel).profile(file)
    (output / f"again-{rank}.json").write_text(str(again))
    (output / "file").write_text("")
    try:
        profiler_of(traced, config, tensor_parallel).profile(output / ("file" if rank == 0 else "folder") / "a.json")
    except ConfigError as error:
        (output / f"refused-{rank}").write_text(str(error))
    dist.destroy_process_group()
