"""`nanoserve profile`: what the operations of a layer cost on this machine, alone and beside each other."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from engine.commands.output_file import check_output_file
from engine.config import DeviceKind, EngineConfig, PipelineMode
from engine.errors import ConfigError
from engine.model_config import ModelConfig
from engine.number_format import NumberFormat

if TYPE_CHECKING:
    from engine.worker import Worker

# From so many seconds on there is time for the finer grid.
THOROUGH_SECONDS = 30.0
BLOCK_SIZE = 64


def profile(
    model: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A checkpoint folder.")],
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Ranks, each a process of this machine.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="The largest batch to measure.")] = 2048,
    seconds: Annotated[
        float, typer.Option(min=0.0, help=f"About how long to measure; from {THOROUGH_SECONDS:.0f} on a finer grid.")
    ] = THOROUGH_SECONDS,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=check_output_file,
            help="What is there is gone on with (default: in the user's cache).",
        ),
    ] = None,
    dtype: Annotated[NumberFormat | None, typer.Option(help="Number format (default: the checkpoint's).")] = None,
    device: Annotated[DeviceKind, typer.Option()] = DeviceKind.CPU,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of a rank (default: its share).")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the longest sequence, as the server has it (default: 2048).")
    ] = None,
    max_sequences: Annotated[
        int | None, typer.Option(min=1, help="Sequences at once, as the server has it (default: 256).")
    ] = None,
) -> None:
    """Measure the operations of a layer for `plan --profile`; interrupted, it goes on where it stopped."""
    from engine.commands.terminal import show_progress
    from engine.local_group import LocalGroup
    from engine.pipeline.profile import Profile
    from engine.pipeline.profile_summary import profile_summary

    model_config = ModelConfig.from_checkpoint(model)
    is_group_of_gpus = device is DeviceKind.CUDA and tensor_parallel > 1
    max_model_len = max_model_len or min(2048, model_config.max_position_embeddings)
    config = EngineConfig(
        model=model_config,
        checkpoint=model,
        dtype=model_config.dtype if dtype is None else dtype.dtype,
        product_format=dtype,
        device=device,
        tensor_parallel=tensor_parallel,
        max_model_len=max_model_len,
        max_batch_tokens=tokens,
        max_sequences=max_sequences or min(256, tokens),
        block_size=BLOCK_SIZE,
        num_blocks=-(-max_model_len // BLOCK_SIZE),  # for one sequence: the profiler brings a cache of its own
        num_threads=threads,
        # Ranks on GPUs that overlap have a way to exchange something beside other work, which is what is measured.
        pipeline=PipelineMode.OVERLAP if is_group_of_gpus else PipelineMode.SEQUENTIAL,
        plan_seconds=0,
    )
    show_progress(f"starting {tensor_parallel} {'ranks' if tensor_parallel > 1 else 'rank'} ...")
    with LocalGroup(config) as group:
        path = group.run(measure, out, seconds)[0]
    typer.echo(f"{profile_summary(Profile.read(path))}\n\nWritten to {path}")


def measure(worker: "Worker", path: Path | None, seconds: float) -> Path:
    """One rank's part; every rank of a group runs it at the same time. The file that holds the profile."""
    import torch

    from engine.pipeline.fingerprint import fingerprint_of
    from engine.pipeline.plan_store import PlanStore
    from engine.pipeline.profile_grid import QUICK, THOROUGH
    from engine.pipeline.profiler import Profiler

    pipeline, config = worker.runner.pipeline, worker.config
    program = pipeline.program
    fingerprint = fingerprint_of(config, program.graph.signature, worker.tensor_parallel)
    profiler = Profiler(
        program,
        config,
        worker.tensor_parallel,
        torch.device(config.device.value),
        fingerprint,
        replace(QUICK if seconds < THOROUGH_SECONDS else THOROUGH, seconds=seconds),
        pipeline.units,
        pipeline.lanes_on(torch.device(config.device.value)),
    )
    if path is not None:
        refuse_another_profile(path, fingerprint)
    chosen = path or PlanStore().profile_path(fingerprint)
    is_first = worker.tensor_parallel.rank == 0
    with tqdm(desc="measured", unit="operation", disable=None if is_first else True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        profiler.profile(chosen, show)
    return chosen


def refuse_another_profile(path: Path, fingerprint: Mapping[str, str]) -> None:
    """Raise `ConfigError` for a file with the profile of another setup, which must not be written over."""
    from engine.pipeline.fingerprint import differences
    from engine.pipeline.profile import Profile

    try:
        found = Profile.read(path)
    except ConfigError:
        return  # not there, or broken, which the profiler says
    if what := differences(found.fingerprint, fingerprint):
        raise ConfigError(
            f"{path} holds the profile of another setup ({'; '.join(what)}): choose another file, or remove it first."
        )
